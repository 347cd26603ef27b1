"""A stand-in for the Hugging Face hub: serves repositories from folders on a loopback port, and takes them.

It answers what transformers, datasets and huggingface_hub ask for when they load a public model or dataset:

- `/api/models/<owner>/<name>[/revision/<revision>]`: a repository's commit
- `/api/models/<owner>/<name>/tree/<revision>[/<folder>]`: its files
- `/<owner>/<name>/resolve/<revision>/<file>`: a file

Datasets are the same below `/api/datasets` and `/datasets`. Every repository has one commit, known as `main`
and by its hash. And what huggingface_hub asks for when it uploads a folder:

- `/api/whoami-v2`: whose token it is
- `/api/repos/create`: a new model, in the user's own namespace
- `/api/validate-yaml`: whether a card begins with metadata
- `/api/models/<owner>/<name>/preupload/main`: how every file is to be sent; the answer is always as it is
- `/api/models/<owner>/<name>/commit/main`: the files, a line of JSON each

All else is answered 404, as the hub answers it.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


class StandInHub:
    """Serves the folders `models/<owner>/<name>` and `datasets/<owner>/<name>` below `root` while the context is open.

    `broken` maps repositories, as `datasets/<owner>/<name>`, to the error status that they answer everything with.
    `requests` lists what was asked for, as `GET /api/models/...`; set HF_ENDPOINT to `endpoint`. `tokens` maps a token
    to the name of its user and its role, "read" or "write"; `private` has the repositories that were made so.
    """

    def __init__(self, root: Path, broken: dict[str, int] | None = None, tokens: dict[str, tuple] | None = None):
        self.root = root
        self.broken = broken or {}
        self.tokens = tokens or {}
        self.requests: list[str] = []
        self.private: set[str] = set()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str) -> dict[str, bytes]:
        """The content of every file of a repository, by its path there."""
        folder = self.root / repository
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def commit(self, repository: str) -> str:
        """The hash of a repository's only commit."""
        return hashlib.sha1(repr(self.files(repository)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        parts = unquote(address.path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[is_api:]
        if is_api and parts == ["whoami-v2"]:
            return self.whoami()
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repository = "/".join([kind, *parts[:2]])
        if repository in hub.broken:
            return self.answer(hub.broken[repository])
        files = hub.files(repository) if len(parts) > 1 and ".." not in parts else {}
        if not files:
            return self.refuse("RepoNotFound")
        commit = hub.commit(repository)
        action = parts[2] if len(parts) > 2 else "revision"
        revision = parts[3] if len(parts) > 3 else "main"
        path = "/".join(parts[4:])
        if revision not in ("main", commit):
            return self.refuse("RevisionNotFound")
        if is_api and action == "revision":
            return self.answer(200, _json({"id": "/".join(parts[:2]), "sha": commit, "private": False}))
        if is_api and action == "tree":
            recursive = parse_qs(address.query).get("recursive") == ["true"]
            entries = _tree(files, path, recursive)
            return self.answer(200, _json(entries)) if entries else self.refuse("EntryNotFound")
        if not is_api and action == "resolve" and path in files:
            tags = {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[path])}"'}
            return self.answer(200, files[path], tags)
        return self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")[1:]
        if parts == ["validate-yaml"]:
            begun, metadata, *_ = json.loads(content)["content"].split("---\n", 2)
            good = not begun and isinstance(yaml.safe_load(metadata), dict)
            return self.answer(200, _json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}))
        owner, role = self.user() or (None, None)
        if parts == ["repos", "create"]:
            asked = json.loads(content)
            repository = f"models/{asked['organization']}/{asked['name']}"
            if role != "write" or asked["organization"] != owner:
                return self.answer(403, _json({"error": "You don't have the rights to create a model there"}))
            made = not (hub.root / repository).exists()
            if made:
                (hub.root / repository).mkdir(parents=True)
                (hub.root / repository / ".gitattributes").write_text("*.safetensors filter=lfs\n")
                hub.private |= {repository} if asked.get("visibility") == "private" else set()
            address = f"{hub.endpoint}/{asked['organization']}/{asked['name']}"
            return self.answer(200 if made else 409, _json({"url": address}))
        repository = "/".join(parts[:3])
        if repository in hub.broken or role != "write" or parts[1] != owner:
            return self.answer(hub.broken.get(repository, 403), _json({"error": "You may not write there"}))
        if parts[3:] == ["preupload", "main"]:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            return self.answer(200, _json({"files": files}))
        if parts[3:] == ["commit", "main"]:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    path = hub.root / repository / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            commit = hub.commit(repository)
            address = f"{hub.endpoint}/{parts[1]}/{parts[2]}/commit/{commit}"
            return self.answer(200, _json({"commitUrl": address, "commitOid": commit}))
        return self.refuse("EntryNotFound")

    def user(self) -> tuple[str, str] | None:
        """Who asks, and what for the token is good."""
        return self.server.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def whoami(self) -> None:
        """Answer whose the token is, 401 if nobody's."""
        if self.user() is None:
            return self.answer(401, _json({"error": "Invalid username or password."}))
        name, role = self.user()
        self.answer(200, _json({"type": "user", "name": name, "auth": {"accessToken": {"role": role}}}))

    def refuse(self, reason: str) -> None:
        """Answer 404 with the hub's word for what is missing."""
        self.answer(404, headers={"X-Error-Code": reason})

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send a response, without its content if it is to a HEAD request."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Keep quiet: `requests` has it."""


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The files and folders in `folder`, or anywhere below it, as the hub describes them."""
    start = f"{folder}/" if folder else ""
    entries = {}
    for path, content in files.items():
        below = path.removeprefix(start).split("/") if path.startswith(start) else []
        for depth in range(1, len(below) if recursive else min(len(below), 2)):
            parent = start + "/".join(below[:depth])
            entries[parent] = {"type": "directory", "path": parent, "oid": _oid(parent.encode()), "size": 0}
        if below and (recursive or len(below) == 1):
            entries[path] = {"type": "file", "path": path, "oid": _oid(content), "size": len(content)}
    return list(entries.values())


def _json(content) -> bytes:
    return json.dumps(content).encode()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
