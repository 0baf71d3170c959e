# SPDX-License-Identifier: Apache-2.0
"""The half of the hub that takes files: repositories and branches are made, large files go elsewhere, a commit holds them all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import yaml

LARGE = 4096
"""Bytes of a file that is kept elsewhere, as git LFS does."""
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Uploads:
    """Who pushes, what arrived, and how it goes wrong.

    Attributes:
        account: What the hub tells of the token's owner.
        read_only: Repositories that the token may not write to.
        private: Repositories that others do not see.
        arrived: Large files by their sha256; only a commit makes them visible.
        failing: Statuses of the next answers, by the last part of an address: ``commit``, ``preupload``, ``create``, ``upload``.
        lost: How many commits are made and not answered.
        ignored: Names that a ``.gitignore`` has.
        remarks: What is said of a model card.
        before_commit: Called once before a commit is looked at.
    """

    account: dict[str, Any] = field(
        default_factory=lambda: {
            "name": "me",
            "orgs": [{"name": "org"}],
            "auth": {"accessToken": {"role": "write"}},
        }
    )
    read_only: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    arrived: dict[str, bytes] = field(default_factory=dict)
    failing: dict[str, list[int]] = field(default_factory=dict)
    lost: int = 0
    ignored: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)
    before_commit: list[Any] = field(default_factory=list)


def blob_of(data: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class TakesFiles(BaseHTTPRequestHandler):
    """Answers of the hub to who writes."""

    hub: Any

    def told(self, status: int, body: object = None, **headers: str) -> None:
        self.answer(status, json.dumps(body or {}).encode(), Content_Type="application/json", **headers)  # type: ignore[attr-defined]

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # an answer that was cut off on purpose
            super().finish()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def takes(self, path: str) -> None:
        """Answer a POST to the hub."""
        data, up = self.body(), self.hub.uploads
        kind = next((part for part in ("create", "branch", "preupload", "batch", "commit") if f"/{part}" in path), "")
        if (statuses := up.failing.get(kind)) and (status := statuses.pop(0)):
            return self.told(status)
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.card(json.loads(data)["content"])
        if path.startswith("/verify"):
            return self.told(200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(data))
        repo, _, rest = path.removeprefix("/api/models/").partition(f"/{kind}/")
        if repo in up.read_only:
            return self.told(403, X_Error_Message="you may not write here")
        if repo not in self.hub.repositories:
            return self.told(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if kind == "branch":
            self.hub.heads[repo][rest] = self.hub.heads[repo]["main"]
            return self.told(201)
        if kind == "preupload":
            return self.modes(repo, rest, json.loads(data)["files"])
        return self.commit(repo, rest, [json.loads(line) for line in data.splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories or repo in self.hub.locked:
            return self.told(409, {"error": "You already created this model repo"})
        self.hub.put(repo, dict(ATTRIBUTES))
        if asked.get("visibility", asked.get("private")) in ("private", True):
            self.hub.uploads.private.add(repo)
        return self.told(200, {"url": f"{self.hub.url}/{repo}"})

    def card(self, content: str) -> None:
        try:
            yaml.safe_load(content.split("---\n")[1] if content.startswith("---\n") else "")
        except yaml.YAMLError as error:
            return self.told(400, {"errors": [{"message": str(error)}]})
        return self.told(200, {"warnings": [{"message": text} for text in self.hub.uploads.remarks]})

    def modes(self, repo: str, revision: str, files: list[dict[str, Any]]) -> None:
        there = self.hub.repositories[repo][self.hub.commit_of(repo, revision)]
        rows = []
        for file in files:
            name, size = file["path"], file["size"]
            assert len(base64.b64decode(file["sample"])) == min(size, 512)
            row = {"path": name, "uploadMode": "lfs" if size > LARGE else "regular"}
            row |= {"shouldIgnore": name in self.hub.uploads.ignored}
            if name in there:
                data = there[name]
                row["oid"] = hashlib.sha256(data).hexdigest() if len(data) > LARGE else blob_of(data)
            rows.append(row)
        self.told(200, {"files": rows})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            oid = one["oid"]
            where = {"href": f"{self.hub.cdn}/upload/{oid}?signature={self.hub.signature}", "header": {}}
            verify = {"href": f"{self.hub.url}/verify/{oid}"}
            actions = {} if oid in self.hub.uploads.arrived else {"actions": {"upload": where, "verify": verify}}
            objects.append({"oid": oid, "size": one["size"], **actions})
        self.told(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        up = self.hub.uploads
        if up.before_commit:
            up.before_commit.pop()()
        head = self.hub.commit_of(repo, branch)
        files = dict(self.hub.repositories[repo][head])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit", head) != head:
                        return self.told(412, {"error": "A commit has happened since"})
                    self.hub.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = up.arrived[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = self.hub.put(repo, files, branch)
        if up.lost:
            up.lost -= 1
            self.connection.shutdown(2)
            self.close_connection = True
            return None
        return self.told(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def arrives(self, path: str, query: dict[str, str]) -> None:
        """Answer a PUT to the other host."""
        data, oid = self.body(), path.removeprefix("/upload/")
        up = self.hub.uploads
        if (statuses := up.failing.get("upload")) and (status := statuses.pop(0)):
            return self.told(status)
        if query.get("signature") != self.hub.signature or self.headers["Authorization"]:
            return self.told(400)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.told(422)
        up.arrived[oid] = data
        return self.told(200)
