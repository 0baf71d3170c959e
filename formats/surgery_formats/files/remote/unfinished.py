# SPDX-License-Identifier: Apache-2.0
"""Uploads that a killed process began and nobody will finish: listed, and given up.

obstore begins, completes and gives up uploads of its own; it cannot list others'. So these two requests of S3 are made
here, with the keys of the environment. Other stores, and keys from elsewhere, leave it to the bucket's own rules:
Azure forgets such blocks after a week, S3 and Google have lifecycle rules for them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as Xml
from datetime import UTC, datetime

from surgery_formats.files.remote.bucket import Bucket

__all__ = ["abort_unfinished"]

_SECONDS = 10
_EMPTY = hashlib.sha256(b"").hexdigest()
_LIMIT = 8 << 20  # bytes of an answer


def abort_unfinished(bucket: Bucket, prefix: str) -> int:
    """Give up the unfinished uploads of objects below `prefix`; how many there were.

    It is a courtesy: where it cannot be done, nothing is said, since the uploads harm nobody but the bill.
    """
    keys = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if bucket.scheme != "s3" or not all(keys):
        return 0
    count = 0
    try:
        listed = _request("GET", bucket.name, "", {"uploads": "", "prefix": f"{prefix}/"})
        if b"<!DOCTYPE" in listed or b"<!ENTITY" in listed:
            return 0
        for upload in Xml.fromstring(listed).iter():
            if upload.tag.rpartition("}")[2] != "Upload":
                continue
            told = {field.tag.rpartition("}")[2]: field.text or "" for field in upload}
            if told.get("Key", "").startswith(f"{prefix}/"):
                _request("DELETE", bucket.name, told["Key"], {"uploadId": told["UploadId"]})
                count += 1
    except (OSError, ValueError, KeyError, Xml.ParseError):
        pass
    return count


def _request(method: str, bucket: str, key: str, query: dict[str, str]) -> bytes:
    """One request, signed (AWS Signature Version 4); its answer."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    named = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    endpoint = next((url for url in named if url), f"https://s3.{region}.amazonaws.com").rstrip("/")
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https"):
        raise ValueError(endpoint)
    path = parts.path + urllib.parse.quote(f"/{bucket}/{key}".rstrip("/"), safe="/-_.~")
    asked = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in sorted(query.items()))
    now = datetime.now(UTC)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    headers = {"host": parts.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    if token := os.environ.get("AWS_SESSION_TOKEN"):
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    lines = [method, path, asked, *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names, _EMPTY]
    scope = f"{day}/{region}/s3/aws4_request"
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    secret = f"AWS4{os.environ['AWS_SECRET_ACCESS_KEY']}".encode()
    for part in (day, region, "s3", "aws4_request"):
        secret = hmac.digest(secret, part.encode(), "sha256")
    signature = hmac.digest(secret, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}".encode(), "sha256").hex()
    credential = f"{os.environ['AWS_ACCESS_KEY_ID']}/{scope}"
    headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
    url = f"{parts.scheme}://{parts.netloc}{path}?{asked}"
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return bytes(answer.read(_LIMIT))


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="-_.~")
