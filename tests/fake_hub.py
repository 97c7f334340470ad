"""A hub on this machine: the few requests that huggingface_hub makes for a repository and its files.

It stands in for huggingface.co in the tests of everything that goes through the hub, errors included. What is pushed
lies below `root` once its commit has come; large files wait in `root`/lfs until then.
"""

from __future__ import annotations

import base64
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
    """Repositories are folders below `root` (models/OWNER/NAME, datasets/OWNER/NAME); a file GATED closes one.
    USERS.json there holds what the hub says about each token, and a file CLOSED refuses every commit."""

    root: Path
    asked: list[str]

    def log_message(self, format, *arguments):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def do_PUT(self):
        self.asked.append(f"PUT {self.path.strip('/')}")
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / self.path.rpartition("/")[2]).write_bytes(self._body())
        self._say({})

    def do_POST(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(f"POST {path}")
        content = self._body()
        asked = {} if path.partition("/commit/")[1] else json.loads(content)
        if path == "api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif self._user() is None:
            self._refuse(401, "")
        elif path == "api/repos/create":
            name = f"{asked.get('organization') or self._user()['name']}/{asked['name']}"
            folder = self.root / "models" / name
            known = folder.exists()
            if not known:
                folder.mkdir(parents=True)
                (folder / ".gitattributes").write_text(f"private={asked.get('visibility') or asked.get('private')}")
            self._say({"url": f"{self._address()}/{name}"}, 409 if known else 200)
        elif "/preupload/" in path:
            modes = [("lfs" if file["path"].endswith(".safetensors") else "regular") for file in asked["files"]]
            files = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(asked["files"], modes, strict=True)
            ]
            self._say({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            places = [
                item | {"actions": {"upload": {"href": f"{self._address()}/lfs/{item['oid']}"}}}
                for item in asked["objects"]
            ]
            self._say({"transfer": "basic", "objects": places})
        else:
            self._commit(path.partition("api/")[2].partition("/commit/")[0], content)

    def _commit(self, repository: str, content: bytes):
        if (self.root / "CLOSED").exists():
            self._refuse(403, "")
            return
        folder = self.root / repository
        for line in map(json.loads, content.splitlines()):
            file = folder / line["value"].get("path", "")
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                (self.root / "lfs" / line["value"]["oid"]).rename(file)
            elif line["key"] == "deletedFile":
                file.unlink()
        url = f"{self._address()}/{repository.partition('/')[2]}/commit/{COMMIT}"
        self._say({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def _user(self) -> dict | None:
        """What the hub knows of the token that came along."""
        file = self.root / "USERS.json"
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        return json.loads(file.read_text()).get(token) if file.exists() else None

    def _address(self) -> str:
        return f"http://{self.headers['host']}"

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _say(self, value, status: int = 200):
        content = json.dumps(value).encode()
        self._send(content, size=len(content), tag="", status=status)

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
        if path == "whoami-v2":
            self._say(user) if (user := self._user()) else self._refuse(401, "")
        elif "/tree/" in path and self._user():
            files = (self.root / path.partition("/tree/")[0]).iterdir()
            self._say([{"type": "file", "path": file.name, "oid": "0", "size": file.stat().st_size} for file in files])
        elif "/tree/" in path:
            self._refuse(404, "EntryNotFound")
        elif not (self.root / repository).is_dir():
            self._refuse(401, "RepoNotFound")
        elif revision not in ("", "main", "refs/convert/parquet"):
            self._refuse(404, "RevisionNotFound")
        else:
            folder = self.root / repository
            files = [{"rfilename": file.name} for file in sorted(folder.iterdir()) if file.is_file()]
            found = {"id": repository.partition("/")[2], "sha": COMMIT, "siblings": files}
            content = json.dumps(found | self._card(folder)).encode()
            self._send(content, size=len(content), tag="")

    @staticmethod
    def _card(folder: Path) -> dict:
        """The head of a repository's README.md, of lines KEY: VALUE."""
        file = folder / "README.md"
        head = file.read_text().split("---")[1].strip().splitlines() if file.is_file() else []
        return {"cardData": dict(line.split(": ", 1) for line in head if ": " in line)} if head else {}

    def _send(self, content: bytes, size: int, tag: str, status: int = 200):
        self.send_response(status)
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
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # pushing goes by LFS
    hub._probe.cache_clear()
    hub.holds.cache_clear()
