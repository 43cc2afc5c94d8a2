"""A model hub on loopback: local folders served as repositories, to the hub's own client, with a record of every file that it takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories `ROOT/owner/name@branch/...`; a commit is the hash of that name."""

    root: Path
    url: str = ""
    taken: list[str] = field(default_factory=list)
    """"owner/name/path" of each file whose content was sent."""

    def commit(self, repo: str, revision: str) -> str | None:
        names = {folder.name.split("@")[1] for folder in (self.root / repo).parent.glob(f"{Path(repo).name}@*")}
        commits = {name: hashlib.sha1(f"{repo}@{name}".encode()).hexdigest() for name in names}
        return next((commit for name, commit in commits.items() if revision in (name, commit)), None)

    def folder(self, repo: str, revision: str) -> Path:
        folders = (self.root / repo).parent.glob(f"{Path(repo).name}@*")
        return next(folder for folder in folders if self.commit(repo, revision) == self.commit(repo, folder.name.split("@")[1]))

    def taken_of(self, repo: str) -> set[str]:
        """Paths of the files that were sent of one repository."""
        return {path.removeprefix(f"{repo}/") for path in self.taken if path.startswith(f"{repo}/")}


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serve the repositories under `root` until the block ends."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, *, with_body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.describe("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
            elif parts[2:3] == ["resolve"]:
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
            else:
                self.reply(404, b"", {})

        def describe(self, repo: str, revision: str) -> None:
            commit = hub.commit(repo, revision)
            if commit is None:
                known = hub.commit(repo, "main") is not None
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
                return
            folder = hub.folder(repo, revision)
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            answer = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def file(self, repo: str, revision: str, name: str, with_body: bool) -> None:
            commit = hub.commit(repo, revision)
            path = hub.folder(repo, revision) / name if commit else Path()
            if commit is None or not path.is_file():
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            if with_body:
                hub.taken.append(f"{repo}/{name}")
            self.reply(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, with_body)

        def reply(self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
