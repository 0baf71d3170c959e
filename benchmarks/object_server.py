# SPDX-License-Identifier: Apache-2.0
"""As much of S3 as `object_storage.py` needs, fast and without a disk: it makes a base up as it is read, and counts what is written.

    python benchmarks/object_server.py SHAPE-AS-JSON SHARDS TARGETS

Bases and adapters are headers with a repeated block of random numbers behind them. Small objects are kept. Of a large one the size
and the xxh3-128 of every part are kept (`/parts/BUCKET/KEY` lists them), so that it can be compared and cannot be read.
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

import numpy as np
import xxhash
from shapes import LINEAR, Shape, shards_of

from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType

KEPT = 64 << 20  # bytes of an upload in one request
READ = 1 << 20


@dataclass
class Object:
    """What is at a key: bytes, or a header and a pattern, or parts that are gone."""

    etag: str
    size: int
    data: bytes = b""
    pattern: memoryview = field(default_factory=lambda: memoryview(b""))
    parts: list[tuple[int, str]] = field(default_factory=list)

    def pieces(self, start: int, stop: int):
        if start < len(self.data):
            yield memoryview(self.data)[start : min(stop, len(self.data))]
        at = max(start, len(self.data))
        while at < stop:
            place = (at - len(self.data)) % len(self.pattern)
            piece = self.pattern[place : place + stop - at]
            yield piece
            at += len(piece)


class Store:
    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, dict[int, tuple[int, str]]] = {}
        self.lock = threading.Lock()
        self.number = 0

    def next(self) -> str:
        with self.lock:
            self.number += 1
            return f"{self.number:032x}"

    def put(self, key: str, data: bytes) -> str:
        self.objects[key] = Object(etag := f'"{self.next()}"', len(data), data)
        return etag


STORE = Store()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True  # as servers do: a body would wait 40 ms behind its header

    def log_message(self, *args) -> None:
        pass

    def asked(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(parts.path).lstrip("/"), dict(
            urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
        )

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.connection.sendall(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key, query = self.asked()
        if key.startswith("parts/"):
            self.answer(200, json.dumps(STORE.objects[key.removeprefix("parts/")].parts).encode())
        elif "uploads" in query:
            self.answer(200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
        elif "list-type" in query:
            self.answer(200, listing(key.rstrip("/"), query))
        elif (found := STORE.objects.get(key)) is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif self.headers.get("If-Match", found.etag) != found.etag:
            self.answer(412)
        else:
            self.range_of(found)

    def range_of(self, found: Object) -> None:
        start, stop, status = 0, found.size, 200
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop, status = int(first), min(int(last) + 1, found.size), 206
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", found.etag)
        self.send_header("Last-Modified", "Sun, 29 Nov 2026 12:00:00 GMT")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{found.size}")
        self.end_headers()
        if self.command != "HEAD":
            for piece in found.pieces(start, stop):
                self.connection.sendall(piece)

    def body(self) -> tuple[int, str, bytes]:
        """The size and digest of what is sent, and the bytes if they are few."""
        size = int(self.headers.get("Content-Length", 0))
        keep = bytearray() if "partNumber" not in self.path and size <= KEPT else None
        state, left, buffer = xxhash.xxh3_128(), size, memoryview(bytearray(READ))
        while left:
            count = self.rfile.readinto(buffer[:left])
            state.update(buffer[:count])
            if keep is not None:
                keep += buffer[:count]
            left -= count
        return size, state.hexdigest(), bytes(keep or b"")

    def do_PUT(self) -> None:
        key, query = self.asked()
        size, digest, data = self.body()
        if "partNumber" in query:
            STORE.uploads[query["uploadId"]][int(query["partNumber"])] = size, digest
            return self.answer(200, ETag=f'"{digest}"')
        if source := self.headers.get("x-amz-copy-source"):
            etag = f'"{STORE.next()}"'
            STORE.objects[key] = replace(STORE.objects[urllib.parse.unquote(source).lstrip("/")], etag=etag)
            return self.answer(200, f"<CopyObjectResult><ETag>{escape(etag)}</ETag></CopyObjectResult>".encode())
        if self.headers.get("If-None-Match") == "*" and key in STORE.objects:
            return self.answer(412)
        return self.answer(200, ETag=STORE.put(key, data))

    def do_POST(self) -> None:
        key, query = self.asked()
        data = self.body()[2]
        if "uploads" in query:
            upload = STORE.next()
            STORE.uploads[upload] = {}
            text = f"<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            return self.answer(200, (text + "</InitiateMultipartUploadResult>").encode())
        if "delete" in query:
            names = [part.split("</Key>")[0] for part in data.decode().split("<Key>")[1:]]
            for name in names:
                STORE.objects.pop(f"{key.rstrip('/')}/{name}", None)
            gone = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            return self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        parts = STORE.uploads.pop(query["uploadId"])
        etag = f'"{STORE.next()}-{len(parts)}"'
        rows = [parts[number] for number in sorted(parts)]
        STORE.objects[key] = Object(etag, sum(size for size, _ in rows), parts=rows)
        text = f"<CompleteMultipartUploadResult><ETag>{escape(etag)}</ETag></CompleteMultipartUploadResult>"
        return self.answer(200, text.encode())

    def do_DELETE(self) -> None:
        key, query = self.asked()
        STORE.uploads.pop(query["uploadId"], None) if "uploadId" in query else STORE.objects.pop(key, None)
        self.answer(204)


def listing(bucket: str, query: dict[str, str]) -> bytes:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    contents, folders = [], {}
    for key, found in sorted(STORE.objects.items()):
        name = key.removeprefix(f"{bucket}/")
        if not key.startswith(f"{bucket}/{prefix}"):
            continue
        head, slash, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if slash:
            folders[prefix + head + slash] = None
            continue
        contents.append(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-29T12:00:00.000Z</LastModified>"
            f"<ETag>{escape(found.etag)}</ETag><Size>{found.size}</Size></Contents>"
        )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(contents)}{common}</ListBucketResult>".encode()


def made_up(shape: Shape, shards: int, targets: tuple[str, ...]) -> None:
    """A base in ``bench/base`` and a LoRA of rank 16 in ``bench/lora``."""
    values = np.random.default_rng(0).normal(0, 0.02, (1 << 23) + 7919).astype(np.float32)
    halves = memoryview(((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes())
    weight_map = {}
    for number, (file, group) in enumerate(shards_of(shape.tensors(), shards).items()):
        weight_map |= {name: file for name, _ in group}
        header, ranges = layout([(name, DType.BF16, size) for name, size in group], {"format": "pt"})
        size = max(begin + nbytes for begin, nbytes in ranges.values())
        STORE.objects[f"bench/base/{file}"] = Object(f'"base{number}"', size, header, halves)
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
    STORE.put("bench/base/model.safetensors.index.json", json.dumps(index).encode())
    STORE.put("bench/base/config.json", json.dumps(shape.config()).encode())
    factors = []
    for layer in range(shape.layers):
        for module in LINEAR:
            if module.rpartition(".")[2] in targets:
                out, inner = shape.linear(module)
                key = f"base_model.model.model.layers.{layer}.{module}"
                factors += [
                    (f"{key}.lora_A.weight", DType.F32, (16, inner)),
                    (f"{key}.lora_B.weight", DType.F32, (out, 16)),
                ]
    header, ranges = layout(factors, {"format": "pt"})
    size = max(begin + nbytes for begin, nbytes in ranges.values())
    STORE.objects["bench/lora/adapter_model.safetensors"] = Object('"lora"', size, header, memoryview(values).cast("B"))
    config = {
        "peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(targets), "task_type": "CAUSAL_LM",
        "bias": "none", "base_model_name_or_path": "base",
    }  # fmt: skip
    STORE.put("bench/lora/adapter_config.json", json.dumps(config).encode())


if __name__ == "__main__":
    made_up(Shape(**json.loads(sys.argv[1])), int(sys.argv[2]), tuple(sys.argv[3].split(",")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
