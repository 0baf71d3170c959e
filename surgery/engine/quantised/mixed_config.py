# SPDX-License-Identifier: Apache-2.0
"""A quantization_config made true for a model of which only some weights are still quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["SIDE_FILES", "leave_alone", "leave_alone_beside", "torn_apart"]

SIDE_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
"""Files beside config.json that say again how the model is quantised: ModelOpt's, AutoAWQ's, AutoGPTQ's."""

_LISTS = {
    "awq": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
    "compressed-tensors": "ignore",
    "fbgemm_fp8": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "hqq": "skip_modules",
    "modelopt": "ignore",
    "mxfp4": "modules_to_not_convert",
    "nvfp4": "modules_to_not_convert",
    "torchao": "modules_to_not_convert",
}
"""Where a method's configuration names the modules that it leaves alone (transformers 5.23, compressed-tensors 0.20)."""
_WITHOUT_DEFAULTS = {
    "awq",
    "compressed-tensors",
    "hqq",
    "modelopt",
}  # the others leave the head alone only if they have no list
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by servers, at loading
_BLOCK = re.compile(r"^(.*?\.\d+)\.(.+)$")


def leave_alone(config: dict[str, Any], plain: Sequence[str], quantised: Sequence[str], head: str) -> None:
    """Say in a quantization_config, in place, which modules are not quantised.

    Args:
        config: The base's.
        plain: Paths of the modules that were quantised.
        quantised: Paths of those that still are.
        head: Path of the model's head if it is not quantised, or empty.

    Raises:
        FitError: its readers cannot mix, or how is not known.
    """
    method = config.get("quant_method")
    if method == "gptq":
        _leave_alone_in_gptq(config, plain, quantised)
    elif method in _LISTS:
        listed = config.get(_LISTS[method])
        before = [str(entry) for entry in listed] if isinstance(listed, list) else []
        if not isinstance(listed, list) and head and method not in _WITHOUT_DEFAULTS:
            before = [head]
        config[_LISTS[method]] = [*before, *(name for name in plain if name not in before)]
    elif method is None and {"group_size", "bits"} <= config.keys():  # MLX
        config |= dict.fromkeys(plain, False)
    else:
        raise FitError(
            f"how a model of '{show(str(method))}' says that some of its weights are not quantised is not known",
            hint="leave out `only_touched=True`",
        )


def leave_alone_beside(file: str, config: dict[str, Any], plain: Sequence[str], quantised: Sequence[str]) -> None:
    """Say the same in one of `SIDE_FILES`, in place."""
    if file == "hf_quant_config.json":
        inner = config.get("quantization")
        if isinstance(inner, dict):
            listed = inner.get("exclude_modules")
            inner["exclude_modules"] = [*(listed if isinstance(listed, list) else []), *plain]
    elif file == "quantize_config.json":
        _leave_alone_in_gptq(config, plain, quantised)
    else:
        listed = config.get("modules_to_not_convert")
        config["modules_to_not_convert"] = [*(listed if isinstance(listed, list) else []), *plain]


def _leave_alone_in_gptq(config: dict[str, Any], plain: Sequence[str], quantised: Sequence[str]) -> None:
    """GPTQModel and vLLM read patterns of names, transformers with optimum names that hold for every block."""
    dynamic = config.get("dynamic")
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in plain}
    config["dynamic"] = {**(dynamic if isinstance(dynamic, Mapping) else {}), **rules}
    left = {name for _, name in _in_blocks(quantised)}
    if left.isdisjoint(name for _, name in _in_blocks(plain)):
        listed = config.get("modules_in_block_to_quantize")
        groups = listed if isinstance(listed, list) else [[name] for name in sorted(left)]
        kept = [[name for name in group if name in left] for group in groups if isinstance(group, list)]
        config["modules_in_block_to_quantize"] = [group for group in kept if group]


def _in_blocks(modules: Sequence[str]) -> list[tuple[str, str]]:
    """``(model.layers.0, self_attn.q_proj)`` of every module in a block."""
    found = (_BLOCK.match(name) for name in modules)
    return [(match[1], match[2]) for match in found if match is not None]


def torn_apart(plain: Sequence[str], quantised: Sequence[str]) -> tuple[str, ...]:
    """Modules of which a server makes one, and of which only some are quantised."""
    torn = []
    there, still = set(plain), set(quantised)
    for name in plain:
        parent, _, leaf = name.rpartition(".")
        fused = next((group for group in _FUSED if leaf in group), ())
        paths = {f"{parent}.{other}" for other in fused}
        if paths & still and paths & there:
            torn.append(name)
    return tuple(torn)
