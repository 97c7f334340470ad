"""A hub on this machine: the few requests that huggingface_hub makes for a repository and its files.

It stands in for huggingface.co in the tests of everything that goes through the hub, errors included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    """Repositories are folders below `root` (models/OWNER/NAME, datasets/OWNER/NAME); a file GATED closes one."""

    root: Path
    asked: list[str]

    def log_message(self, format, *arguments):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(f"{self.command} {path}")
        if path.startswith("api/"):
            self._information(path.removeprefix("api/"))
            return
        repository, _, rest = path.partition("/resolve/")
        folder = self.root / (repository if repository.startswith("datasets/") else f"models/{repository}")
        # Revisions in these tests are "main" or "refs/convert/parquet".
        filename = rest.removeprefix("refs/convert/parquet/") if rest.startswith("refs/") else rest.partition("/")[2]
        if not folder.is_dir():
            self._refuse(401, "RepoNotFound")
        elif (folder / "GATED").exists():
            self._refuse(401, "GatedRepo")
        elif not (folder / filename).is_file():
            self._refuse(404, "EntryNotFound")
        else:
            content = (folder / filename).read_bytes()
            self._send(content if body else b"", size=len(content), tag=hashlib.sha256(content).hexdigest())

    def _information(self, path: str):
        repository, _, revision = path.partition("/revision/")
        if "/tree/" in path:
            self._refuse(404, "EntryNotFound")
        elif not (self.root / repository).is_dir():
            self._refuse(401, "RepoNotFound")
        elif revision not in ("", "main", "refs/convert/parquet"):
            self._refuse(404, "RevisionNotFound")
        else:
            content = json.dumps({"id": repository.partition("/")[2], "sha": COMMIT, "siblings": []}).encode()
            self._send(content, size=len(content), tag="")

    def _send(self, content: bytes, size: int, tag: str):
        self.send_response(200)
        for header, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{tag}"'), ("Content-Length", str(size))):
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories below `root`; gives the hub's address and the list of requests made so far."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def use(address: str, cache: Path, monkeypatch) -> None:
    """Make huggingface_hub, transformers and alps_exp take `address` for the hub, with a cache of their own."""
    from huggingface_hub import constants

    from alps_exp.checkpoints import hub

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._probe.cache_clear()
    hub.holds.cache_clear()
