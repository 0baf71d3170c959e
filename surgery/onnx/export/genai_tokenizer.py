# SPDX-License-Identifier: Apache-2.0
"""``tokenizer_config.json`` for onnxruntime-genai: the special tokens that the tokenizer itself puts around a text.

onnxruntime-genai adds none until it is told to (`tokenizer.update_options(add_special_tokens="true")`), whatever a folder
says. Then it adds those that ``add_bos_token`` and ``add_eos_token`` name, and transformers 5 writes neither. Without
them it guesses: by whether the tokens' names occur anywhere in the post-processor, and by the class. Where that guess is
wrong, both settings are written; what no settings can say is warned of. The rules are those of onnxruntime-extensions,
``operators/tokenizer/bpe_kernels.cc``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.engine.plan import SideFile
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import TOKENIZER_LIMIT, json_bytes, read_object
from surgery_formats.text import show

__all__ = ["with_special_tokens"]

_CONFIG = "tokenizer_config.json"
_BEGINS = ("Llama", "Phi3", "InternLM2", "Gemma", "CodeLlama", "Mistral")
"""Classes, less ``Tokenizer``, for which a beginning is guessed."""

Around = tuple[list[str], list[str]]  # special tokens in front of a text, and behind it


def with_special_tokens(side_files: Sequence[SideFile]) -> tuple[list[SideFile], list[str]]:
    """The same files with settings by which onnxruntime-genai adds what the tokenizer adds, and what it cannot be told.

    Raises:
        MalformedError: a file of the tokenizer is no JSON.
    """
    files = {file.name: file for file in side_files}
    config, tokenizer = _object(files.get(_CONFIG)), _object(files.get("tokenizer.json"))
    model = tokenizer.get("model")
    if not config.get("tokenizer_class") or not isinstance(model, Mapping) or model.get("type") != "BPE":
        return list(side_files), []  # nothing is guessed
    try:
        wanted = _around(tokenizer.get("post_processor"))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise MalformedError("the post-processor has not the form of its type", file="tokenizer.json") from error
    if wanted is None:
        return list(side_files), []  # one of which nothing is known
    if _guessed(config, tokenizer) == wanted:
        return list(side_files), []
    if any(isinstance(config.get(key), bool) for key in ("add_bos_token", "add_eos_token")):
        return list(side_files), [
            f"add_bos_token and add_eos_token of {_CONFIG} say something else than the tokenizer does: onnxruntime-genai "
            "follows them, transformers some classes"
        ]  # which are the author's words
    told = {**config, "add_bos_token": bool(wanted[0]), "add_eos_token": bool(wanted[1])}
    if _guessed(told, tokenizer) != wanted:
        front, behind = (show(" ".join(names)) or "nothing" for names in wanted)
        return list(side_files), [
            f"the tokenizer puts {front} in front of a text and {behind} behind it, which onnxruntime-genai cannot be "
            "told: give it token ids"
        ]
    data = json_bytes(told)
    return [SideFile(_CONFIG, data=data) if file.name == _CONFIG else file for file in side_files], []


def _object(file: SideFile | None) -> dict[str, Any]:
    if file is None:
        return {}
    if file.source is None:
        found = json.loads(file.data)
        return found if isinstance(found, dict) else {}
    return read_object(Path(file.source), TOKENIZER_LIMIT)


def _around(processor: Any) -> Around | None:
    """What a post-processor of the package tokenizers adds to a single text; None for one that is not known."""
    if processor is None:
        return [], []
    kind = processor.get("type") if isinstance(processor, Mapping) else None
    if kind == "ByteLevel":
        return [], []
    if kind == "Sequence":
        front: list[str] = []
        behind: list[str] = []
        for inner in processor.get("processors", []):
            if (found := _around(inner)) is None:
                return None
            front, behind = found[0] + front, behind + found[1]
        return front, behind
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [str(processor["cls"][0])], [str(processor["sep"][0])]
    if kind != "TemplateProcessing":
        return None
    sides: Around = ([], [])
    side = 0
    for piece in processor.get("single", []):
        if "Sequence" in piece:
            side = 1
        else:
            name = piece["SpecialToken"]["id"]
            tokens = processor.get("special_tokens", {}).get(name, {}).get("tokens")
            if not tokens:
                raise MalformedError(f"the template has no token '{show(name, 40)}'", file="tokenizer.json")
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise TypeError("tokens of a template are strings")
            sides[side].extend(tokens)
    return sides


def _guessed(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Around:
    """What onnxruntime-genai (0.18) adds once it is told to add special tokens."""
    bos, eos = (_name(config.get(key)) for key in ("bos_token", "eos_token"))
    first, last = (config.get(key) is True for key in ("add_bos_token", "add_eos_token"))
    told = [isinstance(config.get(key), bool) for key in ("add_bos_token", "add_eos_token")]
    written = json.dumps(tokenizer.get("post_processor"), ensure_ascii=False, separators=(",", ":"))
    if bos and not told[0]:
        first = bos in written
        last = last or (not told[1] and eos in written)
        first = first or str(config["tokenizer_class"]).partition("Tokenizer")[0] in _BEGINS
    elif bos and not first:
        first = bos in written
        last = last or eos in written
    return [bos] if first else [], [eos] if last else []


def _name(token: Any) -> str:
    """A token, which is written as a string or as an object."""
    return str(token.get("content", "") if isinstance(token, Mapping) else token or "")
