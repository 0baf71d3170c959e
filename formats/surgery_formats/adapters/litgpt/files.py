# SPDX-License-Identifier: Apache-2.0
"""litgpt's files, its names for modules, and the few plain values that its YAML files have at their top level."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery_formats.errors import MalformedError
from surgery_formats.files.places import is_folder
from surgery_formats.files.raw import first_bytes

__all__ = ["HYPERPARAMETERS", "MODEL_CONFIG", "MODULES", "QKV", "TENSOR_FILE", "flat_yaml", "own_file", "written_yaml"]

TENSOR_FILE = "lit_model.pth.lora"
HYPERPARAMETERS, MODEL_CONFIG = "hyperparameters.yaml", "model_config.yaml"
QKV = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}
"""The three parts of ``attn.qkv`` in order, and the switches that train them."""
MODULES: Mapping[str, str] = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}

_MOST = 1 << 20
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):[ \t]+(\S.*?)[ \t]*(?:[ \t]#.*)?")
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "~": None}


def own_file(path: Path) -> Path | None:
    """The file that `path` is, or the one in a folder; None for another file."""
    if is_folder(path):
        return path / TENSOR_FILE
    return path if path.name.endswith(".pth.lora") else None


def flat_yaml(path: Path) -> dict[str, Any] | None:
    """The numbers, truth values and texts at the top level of a YAML file; None if there is no such file.

    Raises:
        MalformedError: it is no text.
    """
    raw = first_bytes(path, _MOST)
    if raw is None:
        return None
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError as error:
        raise MalformedError("is no text", file=path) from error
    return {match[1]: _scalar(match[2]) for line in lines if (match := _LINE.fullmatch(line))}


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def written_yaml(values: Mapping[str, Any]) -> bytes:
    """Plain values as YAML, one a line."""
    words = {True: "true", False: "false", None: "null"}
    lines = [f"{k}: {words[v] if v is None or isinstance(v, bool) else v}" for k, v in values.items()]
    return ("\n".join(lines) + "\n").encode()
