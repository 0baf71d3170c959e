# SPDX-License-Identifier: Apache-2.0
"""S3 for tests: moto's server in a thread, and what a test does to a bucket behind our back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer


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

    def unfinished(self) -> list[str]:
        """The names of uploads that were begun, and neither completed nor given up."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return sorted(upload["Key"] for upload in found)
