# SPDX-License-Identifier: Apache-2.0
"""A server of S3 in this process, and buckets of their own for the tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from surgery_formats.files.remote import bucket
from tests.support.s3 import Storage, serve

_NUMBER = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with serve() as url:
        yield url


@pytest.fixture
def storage(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """An empty bucket, which ``s3://`` leads to."""
    name = f"bucket-{os.getpid()}-{next(_NUMBER)}"  # what waits in memory is told by it
    for variable, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
    }.items():
        monkeypatch.setenv(variable, value)
    bucket.connect.cache_clear()
    monkeypatch.setattr(bucket, "RETRIES", 2)
    yield Storage(server, name)
    bucket.connect.cache_clear()
