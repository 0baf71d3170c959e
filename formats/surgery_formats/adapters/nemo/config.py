# SPDX-License-Identifier: Apache-2.0
"""What ``model_config.yaml`` tells of a LoRA: sizes of the model, and ``peft.lora_tuning``.

The file is what OmegaConf writes: mappings in blocks. Only its plain values are read, by their paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.alphas import TELL_ALPHA
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.text import show

__all__ = ["CONFIG_LIMIT", "NemoConfig", "nemo_config", "plain_values"]

CONFIG_LIMIT = 1 << 20
_LINE = re.compile(r"( *)[\"']?([A-Za-z_][A-Za-z0-9_-]{0,63})[\"']?:(?: +(\S.*))?")
_COUNT = re.compile(r"[1-9][0-9]{0,8}")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{0,30})?(e[+-]?[0-9]{1,2})?")  # YAML reads 010 as 8
_OF_DIM = re.compile(r"\$\{[A-Za-z_.]*\badapter_dim\}")
_NONE = ("", "null", "~", "None")


def plain_values(text: str, file: Path) -> dict[str, str]:
    """The values of mappings in blocks, as they are written, by dotted path; lists and what lies in them are left out.

    Raises:
        MalformedError: a path twice.
    """
    values: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # of every line, so that what continues a text over lines lies below its key
    for number, line in enumerate(text.splitlines()):
        if not line.strip(" ") or line.lstrip(" ").startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip(" "))
        depth = len(line) - len(line.lstrip(" "))
        while parents and parents[-1][0] >= depth:
            parents.pop()
        parents.append((depth, f"[{number}]" if match is None else match[2]))
        path = ".".join(name for _, name in parents)
        if match is None or match[3] is None:
            continue
        if path in values:
            raise MalformedError(f"'{show(path)}' appears twice in its model_config.yaml", file=file)
        values[path] = match[3].strip("'\"")
    return values


@dataclass(frozen=True, slots=True)
class NemoConfig:
    """What decides what the tensors mean.

    Attributes:
        rank: ``adapter_dim``.
        alpha: As stated; None where nothing is, which means the rank.
        hidden: Width of the model.
        heads: Of queries.
        groups: Heads of keys and of values.
        head: Rows of a head.
        inner: Width of the MLP.
        activation: Of the MLP; empty where it is not stated.
        base: The model that it was trained on, as a path or name.
    """

    rank: int
    alpha: float | None
    hidden: int
    heads: int
    groups: int
    head: int
    inner: int
    activation: str
    base: str


def nemo_config(text: str, file: Path, told: float | None) -> NemoConfig:
    """Read model_config.yaml.

    Args:
        text: Its content.
        file: Of the archive.
        told: The alpha that the user knows.

    Raises:
        FitError: a number is missing, or something that no weight can hold.
    """
    values = plain_values(text, file)
    tuning = "peft.lora_tuning."
    for key, why in (
        (f"{tuning}weight_tying", "its layers share one LoRA, with embeddings of their positions"),
        ("megatron_legacy", "its rows lie as in Megatron before 2021"),
    ):
        if values.get(key, "false").lower() not in ("false", *_NONE):
            raise FitError(f"{why} ({key}): this is not read", file=file)
    hidden, heads = _count(values, "hidden_size", file), _count(values, "num_attention_heads", file)
    groups = _count(values, "num_query_groups", file, heads)
    head = _count(values, "kv_channels", file, hidden // heads)
    if heads % groups:
        raise FitError(f"{heads} heads in {groups} groups", file=file)
    rank = _count(values, f"{tuning}adapter_dim", file)
    stated = values.get(f"{tuning}alpha", "")
    alpha = None if stated in _NONE else float(rank) if _OF_DIM.fullmatch(stated) else _alpha(stated, file, told)
    if told is not None and told != (rank if alpha is None else alpha):
        raise FitError(f"an alpha of {told:g} was given, its model_config.yaml says otherwise", file=file)
    inner = _count(values, "ffn_hidden_size", file, 4 * hidden)
    base = values.get("restore_from_path", "")
    activation = values.get("activation", "")
    return NemoConfig(rank, alpha, hidden, heads, groups, head, inner, activation, "" if base in _NONE else base)


def _count(values: Mapping[str, str], key: str, file: Path, absent: int = 0) -> int:
    text = values.get(key, "")
    if text in _NONE and absent > 0:
        return absent
    if not _COUNT.fullmatch(text):
        raise FitError(f"its model_config.yaml does not tell {key} ({show(repr(text), 40)})", file=file)
    return int(text)


def _alpha(text: str, file: Path, told: float | None) -> float:
    if _NUMBER.fullmatch(text) and abs(float(text)) <= 1e30:
        return float(text)
    if told is not None:
        return told
    raise FitError(
        f"the scale of its LoRAs is not in its file: its alpha is {show(repr(text), 60)}",
        file=file,
        hint=TELL_ALPHA,
    )
