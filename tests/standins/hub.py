"""A stand-in for the Hugging Face hub on the loopback: what snapshot_download asks of it, for repositories that are directories."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository: a directory's files under one commit.

    Attributes:
        revisions: branches and tags that stand for the commit.
        gated: whether its terms have to be accepted.
    """

    directory: Path
    commit: str
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False

    def files(self) -> list[str]:
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.directory).as_posix() for path in found)


@dataclass
class Hub:
    """The server.

    Attributes:
        repos: by ``owner/name``.
        downloaded: files that were asked for with GET, as ``owner/name/file``.
        parts: files of which a part was asked for, in the same way.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    downloaded: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that shall take it for the hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    """Answers for the hub that a subclass names."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, *rest = "/".join(parts[2:4] if is_api else parts[:2]), *parts[4 if is_api else 2 :]
        repo = self.hub.repos.get(name)
        if repo is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repo.gated and not (is_api and rest[:1] == ["revision"]):
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        elif len(rest) < 2 or rest[1] not in (repo.commit, *repo.revisions):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif is_api:
            self._send(json.dumps(_API[rest[0]](name, repo)).encode(), {"Content-Type": "application/json"}, has_body)
        else:
            self._file(name, repo, "/".join(rest[2:]), has_body)

    def _file(self, name: str, repo: Repo, file: str, has_body: bool) -> None:
        if file not in repo.files():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        data = (repo.directory / file).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": repo.commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if has_body:
            (self.hub.parts if asked else self.hub.downloaded).append(f"{name}/{file}")
        data = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        self._send(data, headers, has_body, 206 if asked else 200)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": message}, False, status)

    def _send(self, data: bytes, headers: dict[str, str], has_body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if has_body:
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, until the body ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _info(name: str, repo: Repo) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in repo.files()]
    return {"id": name, "modelId": name, "sha": repo.commit, "private": False, "siblings": siblings, "tags": []}


def _tree(name: str, repo: Repo) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": file, "size": (repo.directory / file).stat().st_size,
         "oid": hashlib.sha1((repo.directory / file).read_bytes()).hexdigest()}
        for file in repo.files()
    ]  # fmt: skip


_API = {"revision": _info, "tree": _tree}
