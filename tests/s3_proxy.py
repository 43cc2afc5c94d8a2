"""A real HTTP proxy between an S3 client and the S3 server of the tests, which delays, reorders, drops or fails requests as a test says."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

LOST = None
"""In place of an answer: the connection breaks."""
FORBIDDEN = (403, {}, b"<Error><Code>AccessDenied</Code><Message>not now</Message></Error>")
"""An answer that clients do not try to better by asking again."""
Answer = tuple[int, dict[str, str], bytes] | None


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def puts_lease(self) -> bool:
        return self.method == "PUT" and self.path.endswith("/writer.lock")


class Proxy:
    """One client's way to the server. `rule` takes each request and gives its answer, mostly by `forward`."""

    def __init__(self, server: str) -> None:
        self._server = urlsplit(server).netloc
        self.rule: Callable[[Request], Answer] = self.forward
        self.url = ""

    def forward(self, request: Request) -> Answer:
        """The server's own answer."""
        connection = http.client.HTTPConnection(self._server, timeout=30)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


@contextmanager
def running_proxy(server: str) -> Iterator[Proxy]:
    """A proxy on loopback, as long as the block runs."""
    proxy = Proxy(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answered = proxy.rule(Request(self.command, self.path, dict(self.headers), body))
            if answered is None:
                self.close_connection = True
                return
            status, headers, content = answered
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                    self.send_header(name, value)
            length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        proxy.url = f"http://127.0.0.1:{http_server.server_address[1]}"
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            http_server.shutdown()
            thread.join()
