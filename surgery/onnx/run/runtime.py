# SPDX-License-Identifier: Apache-2.0
"""The module onnxruntime, which several packages install under one name: two of them overwrite each other's files."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

from surgery_formats.errors import MissingPackageError
from surgery_formats.extras import require
from surgery_formats.text import show

__all__ = ["RUNTIMES", "clash_cure", "installed_runtimes", "load_runtime"]

RUNTIMES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-silicon",
)
"""Distributions that install the module, best first."""


def installed_runtimes() -> dict[str, str]:
    """Versions of the distributions that are installed, best first."""
    versions = {}
    for name in RUNTIMES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def clash_cure(names: list[str]) -> str:
    """What to type where several distributions, or what is left of them, lie over each other."""
    best = names[0] if names else RUNTIMES[1]
    return f"pip uninstall -y {' '.join(names or RUNTIMES[:2])} && pip install {best}"


@cache
def load_runtime() -> Any:
    """Import onnxruntime.

    Raises:
        MissingPackageError: it is not installed, or what is installed cannot be imported whole.
    """
    try:
        module = require("onnxruntime", "runs of a graph")
    except MissingPackageError:
        raise
    except Exception as error:  # files of two versions, or a library that the system lacks: of any type
        raise _broken(f"{type(error).__name__}: {show(error, 300)}") from error
    if not hasattr(module, "InferenceSession"):  # a folder that another package's uninstallation left behind
        raise _broken("its files are missing")
    return module


def _broken(how: str) -> MissingPackageError:
    names = list(installed_runtimes())
    several = f" ({' and '.join(names)} are both installed, and write the same files)" if len(names) > 1 else ""
    return MissingPackageError(f"onnxruntime cannot be imported: {how}{several}", hint=clash_cure(names))
