"""A stand-in for the Hugging Face hub on loopback: the part of its HTTP interface that loading a repository uses.

Repositories are local folders, `<root>/models/<owner>/<name>` and `<root>/datasets/<owner>/<name>`, with one revision
each. Served are, for a prefix that is empty for models and `datasets/` for datasets:

    HEAD, GET  /<prefix><owner>/<name>/resolve/<revision>/<path>                  a file, whole or a range of it
    GET        /api/<kind>/<owner>/<name>[/revision/<revision>]                   commit and list of files
    GET        /api/<kind>/<owner>/<name>/tree/<revision>[/<path>][?recursive=]   files and folders under a path
    POST       /api/<kind>/<owner>/<name>/paths-info/<revision>                   the same for paths that are named

Everything else, the service for converted datasets included, answers 404 as the hub does for what it does not have.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = r"/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
FILE = re.compile(rf"(?P<kind>/datasets)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
INFO = re.compile(rf"/api/(?P<kind>models|datasets){REPOSITORY}(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(rf"/api/(?P<kind>models|datasets){REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?")
PATHS = re.compile(rf"/api/(?P<kind>models|datasets){REPOSITORY}/paths-info/(?P<revision>[^/]+)")


class StandInHub:
    """Serves the repositories under `root` while its context is open; `url` is what HF_ENDPOINT has to be.

    `requests` lists what was asked for, as "<method> <path> <status>". `broken` maps a repository such as
    "datasets/<owner>/<name>" to the status that every request for it gets.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.requests: list[str] = []
        self.broken: dict[str, int] = {}

    def __enter__(self) -> "StandInHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # clients keep connections open
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str) -> dict[str, Path]:
        """The repository's files by their paths in it."""
        folder = self.root / repository
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, repository: str) -> str:
        """The id of the repository's one commit, a function of what it holds."""
        digest = hashlib.sha1(repository.encode())
        for name, path in self.files(repository).items():
            digest.update(f"{name} {_oid(path)}".encode())
        return digest.hexdigest()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(name: str, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    return {"type": "file", "oid": _oid(path), "size": path.stat().st_size, "path": name}


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        for pattern, answer in ((FILE, self._file), (TREE, self._tree), (INFO, self._info), (PATHS, self._paths)):
            match = pattern.fullmatch(unquote(url.path))
            if match is None:
                continue
            kind = (match["kind"] or "models").strip("/")
            repository = f"{kind}/{match['owner']}/{match['name']}"
            found = (self.hub.root / repository).is_dir()
            status = self.hub.broken.get(repository, 200 if found else 404)
            if status != 200:
                return self._send(status, {"X-Error-Code": "RepoNotFound"} if status == 404 else {})
            self.commit = self.hub.commit(repository)
            if (match["revision"] or "main") not in ("main", self.commit):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"})
            return answer(repository, match, parse_qs(url.query), body)
        return self._send(404)

    do_HEAD = do_POST = do_GET

    def _file(self, repository: str, match: re.Match, query: dict, body: bytes) -> None:
        path = self.hub.files(repository).get(match["path"])
        if path is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
        content = path.read_bytes()
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, headers, content)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._send(206, headers, content[start : end + 1])

    def _info(self, repository: str, match: re.Match, query: dict, body: bytes) -> None:
        siblings = [{"rfilename": name} for name in self.hub.files(repository)]
        name = f"{match['owner']}/{match['name']}"
        info = {"_id": self.commit[:24], "id": name, "sha": self.commit, "siblings": siblings, "tags": []}
        self._json(info | {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def _tree(self, repository: str, match: re.Match, query: dict, body: bytes) -> None:
        top, folder = self.hub.root / repository, self.hub.root / repository / (match["path"] or "")
        if not folder.is_dir():
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(folder.rglob("*") if recursive else folder.iterdir())
        return self._json([_entry(path.relative_to(top).as_posix(), path) for path in found])

    def _paths(self, repository: str, match: re.Match, query: dict, body: bytes) -> None:
        is_json = "json" in self.headers.get("Content-Type", "")
        names = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        found = {name: self.hub.root / repository / name for name in names}
        self._json([_entry(name, path) for name, path in found.items() if path.exists()])

    def _json(self, answer) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.hub.requests.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass
