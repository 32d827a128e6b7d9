"""A real Git LFS server over HTTP for tests, beside the git server: the batch interface and basic transfers."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gitserver import GitHandler, GitServer


class LfsServer(GitServer):
    """Serves repositories and the objects in `contents`, by their SHA-256, to all of them.

    Attributes:
        downloads: the objects that were sent, in order.
    """

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root, handler=_Handler, **options)
        self.contents: dict[str, bytes] = {}
        self.downloads: list[str] = []

    def pointer(self, content: bytes) -> bytes:
        """Take in an object, and return the pointer that stands for it."""
        identity = hashlib.sha256(content).hexdigest()
        self.contents[identity] = content
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            identity.encode(), len(content),
        )  # fmt: skip


class _Handler(GitHandler):
    server: LfsServer

    def do_PUT(self) -> None:  # noqa: N802 - what http.server calls
        self._answer()

    def _is_authorized(self, authorization: str | None) -> bool:
        # A client told that it is authenticated sends no credentials to where it was sent.
        return "/lfs-objects/" in self.path or super()._is_authorized(authorization)

    def _serve(self) -> None:
        if "/lfs-objects/" in self.path:
            self._transfer(self.path.rpartition("/")[2])
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(self._body()))
        elif "/info/lfs/" in self.path:
            self._body()  # left unread, it would reset the connection
            self.send_error(404)
        else:
            super()._serve()

    def _batch(self, asked: dict[str, Any]) -> None:
        answers = [self._about(one, asked["operation"]) for one in asked["objects"]]
        self._send(json.dumps({"transfer": "basic", "objects": answers}).encode())

    def _about(self, one: dict[str, Any], operation: str) -> dict[str, Any]:
        is_there = one["oid"] in self.server.contents
        if operation == "download" and not is_there:
            return {**one, "error": {"code": 404, "message": "Object does not exist"}}
        href = self.server.url(f"lfs-objects/{one['oid']}")
        return {**one, "authenticated": True, "actions": {operation: {"href": href}}}

    def _transfer(self, identity: str) -> None:
        if self.command == "PUT":
            self.server.contents[identity] = self._body()
            self._send(b"")
        else:
            self.server.downloads.append(identity)
            self._send(self.server.contents[identity])

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.git-lfs+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving_lfs(root: Path, **options: Any) -> Iterator[LfsServer]:
    """Serve the repositories below `root`, and LFS objects, while the block runs."""
    with LfsServer(root, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()
