"""One writer at a time in an object store: two who come at once, requests that are slow, reordered, lost or refused, through a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from s3_proxy import FORBIDDEN, LOST, Answer, Proxy, Request, running_proxy

from revq.cache import lease
from revq.cache.store_folder import RemoteFolder, open_folder
from revq.errors import HeldError, OutputError

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 's3fs' 'moto[server]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 's3fs' 'moto[server]'")

LOCK = "s/writer.lock"
ELSEWHERE = {"host": "elsewhere", "machine": "another", "pid": 1, "user": "u", "since": "then", "purpose": "theirs", "token": "t"}
WRITER = """
import sys
from revq.cache import lease
from revq.cache.store_folder import open_folder
from revq.errors import OutputError
lease._SETTLE_S = float(sys.argv[3])
folder = open_folder(sys.argv[1])
folder.exists()
print("ready", flush=True)
input()
try:
    with folder.locked(sys.argv[2]) as warning:
        print("held" if warning is None else warning, flush=True)
        input()
except OutputError as error:
    print(error, flush=True)
"""


@pytest.fixture
def proxies(endpoint: str, bucket: str) -> Iterator[list[Proxy]]:
    """Two ways to the server that a test may spoil."""
    with running_proxy(endpoint) as first, running_proxy(endpoint) as second:
        yield [first, second]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a second, that are renewed in time by hand alone."""
    for name, seconds in {"LEASE_S": 1.0, "_MARGIN_S": 0.2, "_RENEW_S": 60.0, "_SETTLE_S": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)


def keeping_renewals(proxy: Proxy, kept: list[Request]) -> Callable[[Request], Answer]:
    """A rule that refuses the renewals of a lease and keeps them, so that a test can have them arrive when it likes."""

    def rule(request: Request) -> Answer:
        if not request.puts_lease:
            return proxy.forward(request)
        kept.append(request)
        return FORBIDDEN

    return rule


def through(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    """The folder of the tests, reached by that way."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    folder = open_folder("s3://latents/s")
    assert isinstance(folder, RemoteFolder)
    folder.exists()  # connected now
    return folder


def writer(proxy: Proxy, purpose: str, url: str = "s3://latents/s", settle_s: float = 2.0) -> subprocess.Popen[str]:
    """Another process, about to hold that folder."""
    environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
    command = [sys.executable, "-c", WRITER, url, purpose, str(settle_s)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def plant(url: str, holder: dict[str, object]) -> None:
    open_folder(f"{url}/s").write("writer.lock", json.dumps(holder).encode())


def slow_puts(proxy: Proxy, seconds: float) -> Callable[[Request], Answer]:
    def rule(request: Request) -> Answer:
        if request.puts_lease:
            time.sleep(seconds)
        return proxy.forward(request)

    return rule


@pytest.mark.parametrize("slow", [(0.0, 0.5), (0.5, 0.7)], ids=["one slow", "both slow"])
def test_of_two_processes_whose_puts_are_slow_exactly_one_holds_the_store(proxies: list[Proxy], slow: tuple[float, float]) -> None:
    for proxy, seconds in zip(proxies, slow, strict=True):
        proxy.rule = slow_puts(proxy, seconds)
    with ExitStack() as stack:
        writers = [stack.enter_context(writer(proxy, f"writer {number}")) for number, proxy in enumerate(proxies)]
        assert [line(each) for each in writers] == ["ready", "ready"]
        for each in writers:
            say(each)
        answers = [line(each) for each in writers]
        assert answers.count("held") == 1, answers
        winner = answers.index("held")
        assert f"s3://latents/s is being written by another process: process {writers[winner].pid} of " in answers[1 - winner]
        assert f"(writer {winner})" in answers[1 - winner]
        for each in writers:
            each.communicate(input="\n")


@pytest.mark.parametrize("slow", [(0.3, 0.0), (0.3, 0.5)])
def test_of_two_who_take_over_a_lease_that_ran_out_one_gets_it(
    bucket: str, proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch, slow: tuple[float, float]
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_S", 0.05)  # it is the store that decides, not the wait
    plant(bucket, {**ELSEWHERE, "expires": time.time() - 1})
    folders = [through(proxy, monkeypatch) for proxy in proxies]
    for proxy, seconds in zip(proxies, slow, strict=True):
        proxy.rule = slow_puts(proxy, seconds)
    held: list[int] = []

    def hold(number: int) -> str:
        try:
            with folders[number].locked(f"number {number}"):
                held.append(number)
                time.sleep(1.5)
        except HeldError as error:
            return str(error)
        return "held"

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(hold, range(2)))
    assert len(held) == 1
    assert f"(number {held[0]})" in answers[1 - held[0]]


@pytest.mark.parametrize("there", [None, {**ELSEWHERE, "expires": 0}], ids=["created", "taken over"])
def test_a_lease_whose_answer_was_lost_is_held_and_not_refused_to_its_own_holder(
    bucket: str, proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch, there: dict[str, object] | None
) -> None:
    if there is not None:
        plant(bucket, there)
    folder, answered = through(proxies[0], monkeypatch), []

    def rule(request: Request) -> Answer:
        answer = proxies[0].forward(request)
        if not request.puts_lease:
            return answer
        assert answer is not None
        answered.append(answer[0])
        return LOST if len(answered) == 1 else answer

    proxies[0].rule = rule
    with folder.locked("mine") as warning:
        assert warning is None
        assert answered[:2] == [200, 412]  # the client asked again by itself, and was refused what it had got
        with pytest.raises(HeldError, match=r"\(mine\)"), through(proxies[1], monkeypatch).locked("second"):
            pass
    assert open_folder(f"{bucket}/s").read("writer.lock") is None


@pytest.mark.usefixtures("brief")
def test_a_holder_that_could_not_renew_stops_where_another_has_taken_the_lease_and_leaves_it_alone(
    bucket: str, proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (through(proxy, monkeypatch) for proxy in proxies)
    with first.locked("first"):
        first.write("a", b"1")
        time.sleep(1.1)  # asleep, or cut off
        with second.locked("second"):
            for change in (lambda: first.write("a", b"2"), lambda: first.remove("a")):
                with pytest.raises(HeldError, match=r"being written by another process: .*\(second\); this one stops"):
                    change()
            with pytest.raises(HeldError), first.creating("b") as file:
                file.write(b"2")
            second.write("c", b"3")
            assert {key: first.read(key) for key in ("a", "b", "c")} == {"a": b"1", "b": None, "c": b"3"}
        with pytest.raises(HeldError, match="this one stops"):  # for good, though the other has ended
            first.write("a", b"2")


@pytest.mark.usefixtures("brief")
def test_a_holder_that_was_cut_off_for_longer_than_the_lease_goes_on_where_nobody_came(proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = through(proxies[0], monkeypatch)
    with folder.locked("mine"):
        proxies[0].rule = lambda request: FORBIDDEN if request.puts_lease else proxies[0].forward(request)
        time.sleep(0.9)
        with pytest.raises(OutputError, match="cannot be reached"):
            folder.write("a", b"1")
        assert folder.read("a") is None
        proxies[0].rule = proxies[0].forward
        folder.write("a", b"1")
        assert folder.read("a") == b"1"


@pytest.mark.usefixtures("brief")
def test_a_lease_that_was_removed_by_hand_stops_its_holder(bucket: str, monkeypatch: pytest.MonkeyPatch, proxies: list[Proxy]) -> None:
    folder = through(proxies[0], monkeypatch)
    with folder.locked("mine"):
        open_folder(f"{bucket}/s").remove("writer.lock")
        time.sleep(0.9)
        with pytest.raises(HeldError, match=r"the hold of s3://latents/s was removed; this one stops"):
            folder.write("a", b"1")


@pytest.mark.usefixtures("brief")
def test_a_renewal_that_arrives_after_another_has_taken_the_lease_changes_nothing(proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (through(proxy, monkeypatch) for proxy in proxies)
    late: list[Request] = []
    with first.locked("first"):
        proxies[0].rule = keeping_renewals(proxies[0], late)
        time.sleep(0.9)
        with pytest.raises(OutputError, match="cannot be reached"):
            first.write("a", b"1")
        time.sleep(0.2)
        with second.locked("second"):
            proxies[0].forward(late[0])
            assert b'"second"' in (second.read("writer.lock") or b"")
            with pytest.raises(HeldError, match=r"\(second\)"):
                first.write("a", b"1")


@pytest.mark.usefixtures("brief")
def test_a_renewal_that_seemed_to_fail_and_arrived_after_all_is_the_holders_own(proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = through(proxies[0], monkeypatch)
    late: list[Request] = []
    with folder.locked("mine"):
        proxies[0].rule = keeping_renewals(proxies[0], late)
        time.sleep(0.9)
        with pytest.raises(OutputError, match="cannot be reached"):
            folder.write("a", b"1")
        proxies[0].forward(late[0])
        proxies[0].rule = proxies[0].forward
        folder.write("a", b"1")


def test_a_lease_is_renewed_in_the_background_through_failures(proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LEASE_S": 5.0, "_MARGIN_S": 1.0, "_RENEW_S": 0.2}.items():
        monkeypatch.setattr(lease, name, seconds)
    first, second = (through(proxy, monkeypatch) for proxy in proxies)
    puts: list[Request] = []

    def rule(request: Request) -> Answer:
        if not request.puts_lease:
            return proxies[0].forward(request)
        puts.append(request)
        return proxies[0].forward(request) if len(puts) % 3 else FORBIDDEN

    with first.locked("first"):
        proxies[0].rule = rule
        started = time.monotonic()
        while len(puts) < 6 or time.monotonic() < started + 5.5:  # two renewals are refused, and the lease has ended had none gone through
            assert time.monotonic() < started + 60, f"{len(puts)} renewals in a minute"
            with pytest.raises(HeldError, match=r"\(first\)"), second.locked("second"):
                pass


@pytest.mark.usefixtures("brief")
def test_a_store_that_refuses_nothing_is_found_out_and_said_and_still_stops_one_of_two(proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(proxy: Proxy) -> Callable[[Request], Answer]:
        def rule(request: Request) -> Answer:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in {"if-match", "if-none-match"}}
            return proxy.forward(Request(request.method, request.path, headers, request.body))

        return rule

    first, second = (through(proxy, monkeypatch) for proxy in proxies)
    for proxy in proxies:
        proxy.rule = deaf(proxy)
    with first.locked("first") as warning:
        assert "this store does not refuse to create what is there already" in str(warning)
        with pytest.raises(HeldError, match=r"\(first\)"), second.locked("second"):
            pass
        time.sleep(1.1)
        with second.locked("second"), pytest.raises(HeldError, match=r"\(second\)"):
            first.write("a", b"1")
    assert first.read("writer.lock") is None


def test_a_store_without_exclusive_create_holds_one_writer_who_is_told(tmp_path: Path, proxies: list[Proxy]) -> None:
    url = f"local://{tmp_path / 's'}"
    with writer(proxies[0], "first", url, 0.05) as first, writer(proxies[1], "second", url, 0.05) as second:
        assert [line(first), line(second)] == ["ready", "ready"]
        say(first)
        assert "see to it that only one writes" in line(first)
        say(second)
        assert f"process {first.pid} of " in line(second)
        second.communicate()
        first.communicate(input="\n")
    assert list((tmp_path / "s").iterdir()) == []


def test_a_lease_of_another_machine_holds_until_it_runs_out_and_one_of_a_process_that_is_gone_does_not(bucket: str) -> None:
    folder = open_folder(f"{bucket}/s")
    plant(bucket, {**ELSEWHERE, "expires": time.time() + 60})
    with pytest.raises(HeldError, match=r"s is being .* on elsewhere, since then \(theirs\); .* ends by itself in \d+ s"), folder.locked("mine"):
        pass
    assert folder.writer() == "process 1 of u on elsewhere, since then (theirs)"
    assert folder.children() == []
    plant(bucket, {**ELSEWHERE, "expires": time.time() - 1})
    assert folder.writer() is None
    with folder.locked("mine"):
        assert folder.writer() is None  # another one, that is
        holder = json.loads(folder.read("writer.lock") or b"")
    assert folder.read("writer.lock") is None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    plant(bucket, {**holder, "pid": ended.pid, "token": "t"})
    with folder.locked("mine"):
        pass
    plant(bucket, {**holder, "pid": ended.pid, "token": "t", "machine": "another of the same name"})
    with pytest.raises(HeldError), folder.locked("mine"):
        pass


def test_a_bucket_that_is_not_there_is_not_taken_for_one_that_is_held(bucket: str) -> None:
    with pytest.raises(OutputError, match=r"s3://nowhere/s cannot be reached .*bucket does not exist"):
        open_folder("s3://nowhere/s").locked("mine").__enter__()


def test_a_torn_lease_holds_nothing(bucket: str) -> None:
    folder = open_folder(f"{bucket}/s")
    folder.write("writer.lock", b'{"host": "elsew')
    with folder.locked("mine"):
        pass
    assert folder.read("writer.lock") is None


def test_an_error_in_the_block_is_told_though_the_store_is_gone_too(proxies: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = through(proxies[0], monkeypatch)

    def fail() -> None:
        proxies[0].rule = lambda request: FORBIDDEN
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), folder.locked("mine"):
        fail()
    assert not [thread for thread in threading.enumerate() if thread.name == "revq-lease"]
