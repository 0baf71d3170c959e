# SPDX-License-Identifier: Apache-2.0
"""config.json of a model, read with types, and with an eye on what was not read.

A key that a recipe never asks for is mostly about training or serving. One that looks like arithmetic and is switched on is refused: a
model computed without it would be wrong without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Activation
from surgery_formats.text import show

__all__ = ["LAYERS", "ModelSettings"]

_LARGEST = 1 << 31  # of a size; keeps products of two within what a graph can say
LAYERS = 4096  # more is no model, and every layer costs memory here
_REQUIRED: Any = object()

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}

_ARITHMETIC = re.compile(
    r"rope|rotary|alibi|window|softcap|soft_cap|multiplier|logits?_scal|scal(e|ing)|qk_|_norm_|layernorm|clip_|"
    r"cross_attention|bidirectional|causal|expert|moe|quantization_config|position_embedding|sinusoidal|parallel_residual|"
    r"attention_bias|mlp_bias|use_.*bias|layer_types|head_dim|_before$|elementwise|chunk_size|attention_sink|per_layer|kv_shared"
)
_HARMLESS = re.compile(
    r"attn_implementation|cache|dropout|pdrop|_token|initializer|chunk_size_feed_forward|^rope_ratio$"
)


class ModelSettings:
    """Typed access to the fields of a config.json.

    Every method takes the names a field has had, the first one being the name in messages, and raises `FitError` for a wrong type.
    ``null`` counts as missing, except where a method says otherwise.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._read: set[str] = set()

    def raw(self, *keys: str) -> Any:
        """The first of `keys` that is there and not ``null``; all of them count as read."""
        self._read.update(keys)
        return next((found for key in keys if (found := self._config.get(key)) is not None), None)

    def given(self, key: str) -> bool:
        """Whether `key` is there, be it ``null``."""
        self._read.add(key)
        return key in self._config

    def count(self, *keys: str, default: Any = _REQUIRED, most: int = _LARGEST) -> int:
        """A size of at least 1, at most `most`."""
        found = self.raw(*keys)
        if found is None:
            if default is _REQUIRED:
                raise self.fault(f"{keys[0]} is missing")
            return int(default)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 < found <= most:
            raise self.fault(f"{keys[0]} is {show(found, 40)}; it must be a whole number from 1 to {most}")
        return found

    def whole(self, *keys: str, default: int) -> int:
        """A whole number, 0 included."""
        found = self.raw(*keys)
        return 0 if found == 0 and not isinstance(found, bool) else self.count(*keys, default=default)

    def optional_count(self, key: str, default: int | None = None) -> int | None:
        """A size, where ``null`` means none and a missing key means `default`."""
        if self.given(key) and self._config[key] is None:
            return None
        return self.count(key) if self.given(key) else default

    def number(self, *keys: str, default: float) -> float:
        """Any finite number."""
        found = self.raw(*keys)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float) or not -1e30 < found < 1e30:
            raise self.fault(f"{keys[0]} is {show(found, 40)}; it must be a number")
        return float(found)

    def positive(self, *keys: str, default: float) -> float:
        """A number above 0."""
        found = self.number(*keys, default=default)
        if found <= 0:
            raise self.fault(f"{keys[0]} is {found}; it must be above 0")
        return found

    def optional_positive(self, key: str, default: float | None = None) -> float | None:
        """A number above 0, where ``null`` means none and a missing key means `default`."""
        if self.given(key) and self._config[key] is None:
            return None
        return self.positive(key, default=1.0) if self.given(key) else default

    def flag(self, *keys: str, default: bool) -> bool:
        """True or false."""
        found = self.raw(*keys)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise self.fault(f"{keys[0]} is {show(found, 40)}; it must be true or false")
        return found

    def text(self, *keys: str, default: str) -> str:
        """A word."""
        found = self.raw(*keys)
        if found is None:
            return default
        if not isinstance(found, str):
            raise self.fault(f"{keys[0]} is {show(found, 40)}; it must be text")
        return found

    def mapping(self, *keys: str) -> dict[str, Any] | None:
        """An object, or None."""
        found = self.raw(*keys)
        if found is not None and not isinstance(found, Mapping):
            raise self.fault(f"{keys[0]} must be an object")
        return None if found is None else dict(found)

    def words(self, key: str, length: int, allowed: Sequence[str]) -> tuple[str, ...] | None:
        """One of the words `allowed` for each layer, or None."""
        found = self.raw(key)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) < length:
            raise self.fault(f"{key} must be a list with an entry for each of the {length} layers")
        for word in found[:length]:
            if word not in allowed:
                raise self.fault(f"{key} has '{show(word, 40)}', known are {', '.join(allowed)}")
        return tuple(found[:length])

    def activation(self, *keys: str, default: str) -> Activation:
        """An activation function."""
        name = self.text(*keys, default=default)
        if name not in _ACTIVATIONS:
            raise self.fault(f"{keys[0]} is '{show(name, 40)}', known are {', '.join(sorted(_ACTIVATIONS))}")
        return _ACTIVATIONS[name]

    def only(self, key: str, *values: Any) -> None:
        """Refuse `key` unless it is missing, ``null`` or one of `values`."""
        found = self.raw(key)
        if found is not None and not any(type(found) is type(value) and found == value for value in values):
            raise self.fault(f"{key} is {show(found, 60)}, which is not supported")

    def architectures(self) -> tuple[str, ...]:
        """Class names the checkpoint was saved from."""
        found = self.raw("architectures")
        if found is None:
            return ()
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise self.fault("architectures must be a list of class names")
        return tuple(found)

    def finish(self) -> None:
        """Refuse what looks like arithmetic, is switched on and was never read."""
        for key, value in self._config.items():
            if key in self._read or _HARMLESS.search(key) or not _ARITHMETIC.search(key):
                continue
            neutral = value is None or value is False or (isinstance(value, str | list | dict) and not value)
            if neutral or (not isinstance(value, bool) and value in (0, 1)):
                continue
            raise self.fault(
                f"{show(key, 60)} is {show(value, 60)}: a switch that may change what the model computes, and is not known"
            )

    def fault(self, what: str) -> FitError:
        """The error for a setting that does not fit."""
        return FitError(
            what, file="config.json", hint=f"the recipe is of model_type '{show(self._config.get('model_type'), 40)}'"
        )
