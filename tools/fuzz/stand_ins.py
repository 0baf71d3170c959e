# SPDX-License-Identifier: Apache-2.0
"""Digests and limits of threads, which readers import and do not need, where their packages are not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

made: Any
if importlib.util.find_spec("xxhash") is None:
    import hashlib

    made = types.ModuleType("xxhash")
    made.xxh3_128 = lambda data=b"": hashlib.blake2b(data, digest_size=16)
    made.xxh3_128_hexdigest = lambda data: hashlib.blake2b(data, digest_size=16).hexdigest()
    sys.modules["xxhash"] = made
if importlib.util.find_spec("threadpoolctl") is None:
    made = types.ModuleType("threadpoolctl")
    limits = types.SimpleNamespace(restore_original_limits=lambda: None)
    made.ThreadpoolController = lambda: types.SimpleNamespace(limit=lambda **_: limits)
    sys.modules["threadpoolctl"] = made
