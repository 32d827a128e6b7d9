"""A real git server over HTTP for tests: `git http-backend` behind a small threaded server on 127.0.0.1.

It can ask for Basic authentication, answer the first requests with errors, or be silent. What arrived is recorded, and
with it the command lines of everything that ran at that moment.
"""

import base64
import gzip
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class GitServer(http.server.ThreadingHTTPServer):
    """Serves the bare repositories below a directory.

    Attributes:
        credentials: `user:password` that is asked for. failures: statuses to answer the next requests with.
        silence: while set, requests are accepted and never answered, until `stop` is.
        requests: path and authorization of every request. packs_asked_for: how many of them asked for objects.
        command_lines: of all processes, whenever a request came.
    """

    daemon_threads = True

    def __init__(
        self,
        root: Path,
        *,
        credentials: str | None = None,
        failures: list[int] | None = None,
        handler: "type[GitHandler] | None" = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler or GitHandler)
        self.root = root
        self.credentials = credentials
        self.failures = failures or []
        self.silence = threading.Event()
        self.stop = threading.Event()
        self.requests: list[tuple[str, str | None]] = []
        self.packs_asked_for = 0
        self.command_lines: set[bytes] = set()
        self.arrived = threading.Event()

    def url(self, name: str, *, userinfo: str = "") -> str:
        return f"http://{userinfo}{'@' if userinfo else ''}127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error of the server."""


class GitHandler(http.server.BaseHTTPRequestHandler):
    server: GitServer

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        authorization = self.headers.get("Authorization")
        self.server.requests.append((self.path, authorization))
        self.server.command_lines |= _command_lines()
        self.server.arrived.set()
        if self.server.silence.is_set():
            self.server.stop.wait(60)
        elif self.server.failures:
            self.send_error(self.server.failures.pop(0))
        elif self.server.credentials is not None and not self._is_authorized(authorization):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="test"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._serve()

    def _is_authorized(self, authorization: str | None) -> bool:
        assert self.server.credentials is not None
        return authorization == "Basic " + base64.b64encode(self.server.credentials.encode()).decode()

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_USER": "somebody",
            "REMOTE_ADDR": "127.0.0.1",
        }
        body = self._body()
        wanted = gzip.decompress(body) if environment["HTTP_CONTENT_ENCODING"] == "gzip" else body
        self.server.packs_asked_for += b"command=fetch" in wanted
        # It exits with an error where it refuses, having said so in its answer.
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        headers = [line.decode().split(": ", 1) for line in head.split(b"\r\n")]
        self.send_response(next((int(value.split()[0]) for name, value in headers if name == "Status"), 200))
        for name, value in headers:
            if name != "Status":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


def _command_lines() -> set[bytes]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.add(path.read_bytes())
    return found


@contextmanager
def serving(root: Path, *, credentials: str | None = None, failures: list[int] | None = None) -> Iterator[GitServer]:
    """Serve the repositories below `root` while the block runs."""
    with GitServer(root, credentials=credentials, failures=failures) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()
