"""A Python that starts in milliseconds: its processes are forked from one that has imported torch and the rest already.

`warm_python(folder)` gives a program to be used in place of `sys.executable` with `-m MODULE` and `-c CODE`. Each of its processes is one of its own,
with its own arguments, environment, working folder, output and exit code; a fresh interpreter spends 3 to 8 s of processor time before it gets there.
What forking hides is a module that forgot an import, and an order that follows hashes: parts of test_cli.py, test_readme.py, test_wheel.py and
test_threads.py start fresh ones. The process id is not that of the program, so a test that needs it, or signals, starts a fresh one too.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

PRELOADED = ["diffusers.models.autoencoders", "faiss", "numba", "s3fs", "tensorboard.compat", "torch._dynamo", "torch.distributed.launcher.api"]
PRELOADED += ["revq.pipeline.run"]
PRELOADED += [f"revq.stages.{stage}" for stage in ("encode_latents", "fit_codebooks", "train_rectifier", "evaluate")]
# Names in the environment that nothing reads while it is imported, by how they begin. Where another one has changed, a fresh Python is started.
READ_WHEN_USED = ("AWS_", "GLOO_", "PYTEST_", "PYTHON_EXEC", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "XDG_")
READ_WHEN_USED += ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")  # of torchrun
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
words, environment, first = sys.argv[1:], dict(os.environ), {first!r}
changed = [name for name in environment.keys() | first.keys() if environment.get(name) != first.get(name)]
if not all(name.startswith({read_when_used!r}) for name in changed):
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([[word for word in words if word != "-u"] if words[0] == "-u" else words, environment, os.getcwd()]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(asked)
    answers = server.makefile("r")
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    status = int(answers.readline())
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """Path of the program, as long as the block runs; `folder` is an empty one for it."""
    address, program = str(folder / "s"), folder / "python"
    values = {"python": sys.executable, "first": dict(os.environ), "read_when_used": READ_WHEN_USED, "address": address}
    program.write_text(CLIENT.format(**values))
    program.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield str(program)
        server.stdin.close()  # which ends it


def serve(address: str) -> None:
    """Fork a process for each client, until standard input ends; a client that goes away takes its process with it."""
    for name in PRELOADED:
        importlib.import_module(name)
    clients: dict[int, socket.socket] = {}
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes.fileno())
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(64)
        for file in (listener, woken, sys.stdin):
            selector.register(file, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is woken:
                    woken.recv(4096)
                    reap(clients, selector)
                elif key.fileobj is listener:
                    client, _ = listener.accept()
                    header, files, _, _ = socket.recv_fds(client, 8, 3)
                    words, environment, working = json.loads(client.makefile("rb").read(int.from_bytes(header, "big")))
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for other in (listener, woken, wakes, client, *clients.values()):
                            other.close()
                        become(words, environment, working, files)
                    for file in files:
                        os.close(file)
                    client.sendall(f"{pid}\n".encode())
                    clients[pid] = client
                    selector.register(client, selectors.EVENT_READ, pid)
                elif key.data in clients:  # the client has gone
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(clients[key.data])


def reap(clients: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tell the clients whose processes have ended how."""
    for pid in list(clients):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with clients.pop(pid) as client:
                if client in selector.get_map():
                    selector.unregister(client)
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def become(words: list[str], environment: dict[str, str], working: str, files: list[int]) -> NoReturn:
    """Be the process that was asked for."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(working)
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    kind, what, *rest = words
    code: object = 0
    try:
        sys.argv = [what if kind == "-m" else kind, *rest]
        sys.path[0] = working if kind == "-m" else ""
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
        else:
            raise ValueError(f"warm_python takes -m MODULE or -c CODE, not {kind}")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    serve(sys.argv[1])
