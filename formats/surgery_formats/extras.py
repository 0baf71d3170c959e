# SPDX-License-Identifier: Apache-2.0
"""Packages that only some commands need, and the extra of this distribution that installs each.

They are imported where they are used. What a command then lacks is told in one message with the line that installs it: by
`require`, where the purpose is known, and by `explained` for the many modules that import onnx or torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import ParamSpec, TypeVar

from surgery_formats.errors import MissingPackageError

__all__ = ["EXTRAS", "explained", "install_line", "missing_package", "require"]

P = ParamSpec("P")
R = TypeVar("R")

EXTRAS = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "torch": "torch",
    "tokenizers": "run",
    "huggingface_hub": "hub",
    "gguf": "gguf",
    "obstore": "cloud",
    "ray": "ray",
}
"""The extra of each package, by the name it is imported by."""


def install_line(extra: str) -> str:
    """What to type to get an extra."""
    return f"pip install 'model-surgery[{extra}]'"


def require(name: str, purpose: str, *, otherwise: str = "") -> ModuleType:
    """Import the package `name` of `EXTRAS`.

    Args:
        name: As it is imported.
        purpose: What needs it, in the plural: "names on the hub".
        otherwise: What can be done without it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is there, and lacks something itself
        hint = install_line(EXTRAS[name]) + (f", or {otherwise}" if otherwise else "")
        raise MissingPackageError(f"{purpose} need the package {name}, which is not installed", hint=hint) from error


def missing_package(error: BaseException) -> MissingPackageError | None:
    """The error to show for a failed import, if it is that of a package of `EXTRAS`."""
    if not isinstance(error, ModuleNotFoundError) or (name := error.name) is None or name not in EXTRAS:
        return None
    return MissingPackageError(
        f"this needs the package {name}, which is not installed", hint=install_line(EXTRAS[name])
    )


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which raises `MissingPackageError` where a package of `EXTRAS` cannot be found."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            if (missing := missing_package(error)) is None:
                raise
            raise missing from error

    return call
