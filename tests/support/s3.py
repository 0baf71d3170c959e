# SPDX-License-Identifier: Apache-2.0
"""S3 for tests: moto's server in a thread, and what a test does to a bucket behind our back."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from surgery_formats.files.output.memory import memory_folder


@contextmanager
def serve() -> Iterator[str]:
    """The address of a server with nothing in it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


class Storage:
    """One bucket, seen by another client."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        self.client.create_bucket(Bucket=name)

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str) -> str:
        """Put a folder's files below a prefix; its reference."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return self.url(prefix)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What can be seen below a prefix, by name."""
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])
        keys = [entry["Key"] for entry in listed]
        return {
            key.removeprefix(prefix).lstrip("/"): self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
            for key in keys
        }

    def clear(self, prefix: str) -> None:
        for name in self.objects(prefix):
            self.client.delete_object(Bucket=self.name, Key=prefix + name)

    def waiting(self, key: str) -> list[str]:
        """What waits in memory for an output."""
        name = hashlib.sha256(self.url(key).encode()).hexdigest()[:16]
        return [path.name for path in memory_folder().iterdir() if name in path.name]

    def unfinished(self) -> list[str]:
        """The names of uploads that were begun, and neither completed nor given up."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return sorted(upload["Key"] for upload in found)


@contextmanager
def refusing(status: int, body: bytes) -> Iterator[str]:
    """The address of a server that has one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Faults:
    """A way to a server that counts requests and fails some: the server ends every connection after one.

    Attributes:
        url: Its address.
        count: Requests so far.
        fail: Numbers of the requests that fail, from 1.
        how: ``refused`` before anything was sent; ``request`` while it is sent; ``answer``: the server has done it, and
            half of the answer arrives.
        also: Called with the number of every request.
    """

    def __init__(self, server: str) -> None:
        self._server = server.removeprefix("http://").split(":")
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.count = 0
        self.fail: Callable[[int], bool] = lambda number: False
        self.also: Callable[[int], None] = lambda number: None
        self.how = "refused"
        threading.Thread(target=self._accept, daemon=True).start()

    def begin(self, how: str = "refused", fail: Callable[[int], bool] = lambda number: False) -> None:
        self.count, self.how, self.fail, self.also = 0, how, fail, lambda number: None

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.count += 1
                threading.Thread(target=self._serve, args=(client, self.count), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        self.also(number)
        failing = self.how if self.fail(number) else ""
        with suppress(OSError), client:
            if failing == "refused":
                return
            with socket.create_connection((self._server[0], int(self._server[1]))) as server:
                sender = threading.Thread(target=_copy, args=(client, server, 200 if failing == "request" else None))
                sender.start()
                if failing == "answer":
                    answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
                    client.sendall(answer[: len(answer) // 2])
                elif failing != "request":
                    _copy(server, client, None)
                else:
                    sender.join()
                client.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket, most: int | None) -> None:
    """Pass on what comes, or the first `most` bytes of it."""
    with suppress(OSError):
        while data := source.recv(1 << 16 if most is None else most):
            target.sendall(data)
            if most is not None:
                return
