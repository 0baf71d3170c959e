# SPDX-License-Identifier: Apache-2.0
"""As much of the hub as reading and pushing models asks for, and the host of its large files: two servers of this process."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from surgery_formats.files.remote import hub as hub_files
from tests.support.hub_uploads import ATTRIBUTES, LARGE, TakesFiles, Uploads, blob_of

TOKEN = "hf_a-secret-that-nobody-prints"
SIGNATURE = "signed-by-the-hub"


@dataclass
class Asked:
    """One request: by whom it was answered, and what was said."""

    host: str
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0


@dataclass
class Hub:
    """What the hub holds, what it was asked, and how it misbehaves.

    Attributes:
        url: Of the hub.
        repositories: Files by repository and commit.
        heads: The commit of each branch, by repository.
        messages: Of commits that were pushed.
        uploads: Who pushes, and what becomes of it.
        lock: Repositories that answer with an error: the status, and the hub's code for it.
        drop: How many answers with weights break off in the middle.
        expire: How many signed addresses are refused once.
        other: What the other host has for every file, instead of it.
    """

    url: str = ""
    cdn: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    uploads: Uploads = field(default_factory=Uploads)
    locked: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    drop: int = 0
    expire: int = 0
    whole: bool = False
    other: bytes | None = None
    signature: str = SIGNATURE

    def add(self, repo: str, folder: Path) -> str:
        """Put a folder's files into a new commit of `repo`; the commit."""
        return self.put(repo, contents(folder))

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of `repo`."""
        commits = self.repositories.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits[commit] = files
        self.heads.setdefault(repo, {})[branch] = commit
        return commit

    def commit_of(self, repo: str, revision: str) -> str | None:
        commits = self.repositories.get(repo, {})
        return self.heads.get(repo, {}).get(revision, revision if revision in commits else None)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return self.repositories[repo][self.heads[repo][branch]]

    def bytes_of(self, name: str) -> int:
        """How many bytes of a file were sent."""
        return sum(asked.sent for asked in self.asked if asked.path.endswith(name))

    def methods(self) -> list[str]:
        return [f"{asked.method} {asked.path}" for asked in self.asked]


def etag_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) > LARGE else blob_of(data)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pushed(hub: Hub, repo: str, branch: str = "main") -> dict[str, bytes]:
    """What a branch holds beside the hub's own file."""
    files = dict(hub.files(repo, branch))
    assert files.pop(".gitattributes") == ATTRIBUTES[".gitattributes"]
    return files


class _Handler(TakesFiles):
    protocol_version = "HTTP/1.1"
    hub: Hub
    host = ""

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", cut: int | None = None, **headers: str) -> None:
        self.asked.sent = len(body) if self.command == "GET" else 0
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(2)
                self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        self.asked = Asked(self.host, self.command, path, self.headers["Range"], self.headers["Authorization"])
        self.hub.asked.append(self.asked)
        self.reply(path, dict(urllib.parse.parse_qsl(parts.query)))

    def reply(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def data(self, data: bytes, **headers: str) -> None:
        cut = None
        if self.command == "GET" and self.hub.drop:
            self.hub.drop -= 1
            cut = 100
        if (asked := self.headers["Range"]) and not self.hub.whole:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            told = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.answer(206, data[start:stop], cut, Content_Range=told, **headers)
        return self.answer(200, data, cut, **headers)


class _Front(_Handler):
    host = "hub"

    def reply(self, path: str, query: dict[str, str]) -> None:
        if self.command == "POST":
            self.takes(path)
        elif path == "/api/whoami-v2":
            self.told(200, self.hub.uploads.account)
        elif path.endswith("/auth-check/write"):
            repo = path.removeprefix("/api/models/").removesuffix("/auth-check/write")
            self.told(403 if repo in self.hub.uploads.read_only else 200)
        elif path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            rest, _, _ = rest.partition("/tree")
            if "/tree/" in repo:
                repo, _, rest = repo.partition("/tree/")
            self.listing(repo, rest or "main", "/tree/" in path)
        elif "/resolve/" in path:
            repo, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.file(repo, revision, name)
        else:
            self.answer(404)

    def refused(self, repo: str, revision: str) -> bool:
        if found := self.hub.locked.get(repo):
            self.answer(found[0], X_Error_Code=found[1], X_Error_Message=found[1])
        elif repo not in self.hub.repositories:
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif self.hub.commit_of(repo, revision) is None:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        else:
            return False
        return True

    def listing(self, repo: str, revision: str, tree: bool) -> None:
        if self.refused(repo, revision):
            return
        commit = self.hub.commit_of(repo, revision)
        files = self.hub.repositories[repo][commit or ""]
        rows = []
        for name, data in files.items():
            lfs = {"size": len(data), "sha256": etag_of(data), "oid": etag_of(data), "pointerSize": 134}
            row = {"rfilename": name, "path": name, "type": "file", "size": len(data)}
            row |= {"blobId": blob_of(data), "oid": blob_of(data)}
            rows.append({**row, "lfs": lfs} if len(data) > LARGE else row)
        private = repo in self.hub.uploads.private
        body = rows if tree else {"id": repo, "sha": commit, "siblings": rows, "private": private}
        self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def file(self, repo: str, revision: str, name: str) -> None:
        if self.refused(repo, revision):
            return None
        commit = self.hub.commit_of(repo, revision) or ""
        data = self.hub.repositories[repo][commit].get(name)
        told = {"X_Repo_Commit": commit}
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", **told)
        if len(data) <= LARGE:
            return self.data(data, ETag=f'"{etag_of(data)}"', **told)
        told |= {"X_Linked_ETag": f'"{etag_of(data)}"', "X_Linked_Size": str(len(data))}
        where = f"{self.hub.cdn}/{repo}/{commit}/{urllib.parse.quote(name)}?signature={SIGNATURE}"
        return self.answer(302, b"", Location=where, **told)


class _Elsewhere(_Handler):
    host = "elsewhere"

    def reply(self, path: str, query: dict[str, str]) -> None:
        if self.command == "PUT":
            return self.arrives(path, query)
        if query.get("signature") != SIGNATURE or self.headers["Authorization"]:
            return self.answer(400)  # as S3 answers who signs twice
        if self.hub.expire:
            self.hub.expire -= 1
            return self.answer(403)
        owner, name, commit, file = path.lstrip("/").split("/", 3)
        data = self.hub.other or self.hub.repositories[f"{owner}/{name}"][commit][file]
        return self.data(data)


@contextmanager
def serve() -> Iterator[Hub]:
    """An empty hub."""
    hub = Hub()
    with ExitStack() as stack:
        urls = []
        for kind in (_Front, _Elsewhere):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            urls.append(f"http://127.0.0.1:{server.server_port}")
        hub.url, hub.cdn = urls
        yield hub


@contextmanager
def reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process talks to, with an empty cache, and an empty folder to be in."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub_files, "_PAUSE", 0.0)
        monkeypatch.setattr(hub_files, "_opened", {})
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub
