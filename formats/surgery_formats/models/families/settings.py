# SPDX-License-Identifier: Apache-2.0
"""Typed access to a model's config.json that notices what was not read.

A key that no recipe reads is mostly about training or serving. One that looks like arithmetic and is enabled is
refused: ignoring it would silently compute a different model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Activation
from surgery_formats.text import show

__all__ = ["MOST_EXPERTS", "MOST_LAYERS", "ModelSettings", "Sizes", "read_sizes"]

T = TypeVar("T")

_LARGEST = 1 << 31  # bound on a size; keeps products of two sizes within the range of a graph
MOST_LAYERS = 4096
"""Bound on the number of layers, each of which costs memory here."""
MOST_EXPERTS = 1 << 17
"""Bound on the number of experts of all layers together, as `MOST_LAYERS`."""
_MOST_HEADS = 1 << 16  # some recipes have a number, or a norm, for each
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
    "relu2": "relu2",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
}

_ARITHMETIC = re.compile(
    r"rope|rotary|alibi|window|softcap|soft_cap|multiplier|logits?_scal|scal(e|ing)|qk_|_norm_|layernorm|clip_|"
    r"cross_attention|bidirectional|causal|expert|moe|quantization_config|position_embedding|sinusoidal|"
    r"parallel_residual|attention_bias|mlp_bias|use_.*bias|layer_types|head_dim|_before$|elementwise|chunk_size|"
    r"attention_sink|per_layer|kv_shared"
)
_HARMLESS = re.compile(
    r"attn_implementation|cache|dropout|pdrop|_token|initializer|chunk_size_feed_forward|^rope_ratio$"
)


class ModelSettings:
    """Typed access to the fields of a config.json, and the names of the checkpoint's tensors.

    The names tell what only the file reveals: an optional bias, a prefix that bare models lack. Methods take all names
    a field has had; messages use the first one. A wrong type raises `FitError`. ``null`` counts as missing unless a
    method documents otherwise.
    """

    def __init__(self, config: Mapping[str, Any], names: Collection[str] = (), task: str = "") -> None:
        """`task` is the one that was asked for; empty for the one that the model was saved for.

        `root` is what the names of a model inside another begin with, and `head` the module of its head; empty for a whole model.
        """
        self.root = ""
        self.head = ""
        self._config = config
        self.names = names
        self.task = task
        self._read: set[str] = set()

    def raw(self, *keys: str) -> Any:
        """Return the first of `keys` that is present and not ``null``; all of them count as read."""
        self._read.update(keys)
        return next((value for key in keys if (value := self._config.get(key)) is not None), None)

    def has(self, key: str) -> bool:
        """Whether `key` is present, even if ``null``."""
        self._read.add(key)
        return key in self._config

    def everything(self, *without: str) -> dict[str, Any]:
        """All fields, which count as read, but for those `without`."""
        self._read.update(self._config)
        return {key: value for key, value in self._config.items() if key not in without}

    def count(self, *keys: str, default: Any = _REQUIRED, most: int = _LARGEST) -> int:
        """Read a size from 1 to `most`."""
        value = self.raw(*keys)
        if value is None:
            if default is _REQUIRED:
                raise self.fault(f"{keys[0]} is missing")
            return int(default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self.fault(f"{keys[0]} is {show(value, 40)}; it must be a whole number from 1 to {most}")
        return value

    def whole(self, *keys: str, default: int, most: int = _LARGEST) -> int:
        """Read a whole number from 0 to `most`."""
        value = self.raw(*keys)
        return 0 if value == 0 and not isinstance(value, bool) else self.count(*keys, default=default, most=most)

    def optional_count(self, key: str, default: int | None = None) -> int | None:
        """Read a size; ``null`` gives None and a missing key gives `default`."""
        return default if not self.has(key) else None if self._config[key] is None else self.count(key)

    def number(self, *keys: str, default: float) -> float:
        """Read a finite number."""
        value = self.raw(*keys)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
            raise self.fault(f"{keys[0]} is {show(value, 40)}; it must be a number")
        return float(value)

    def positive(self, *keys: str, default: float) -> float:
        """Read a number above 0."""
        value = self.number(*keys, default=default)
        if value <= 0:
            raise self.fault(f"{keys[0]} is {value}; it must be above 0")
        return value

    def optional_positive(self, key: str, default: float | None = None) -> float | None:
        """Read a number above 0; ``null`` gives None and a missing key gives `default`."""
        return default if not self.has(key) else None if self._config[key] is None else self.positive(key, default=1.0)

    def _typed(self, keys: tuple[str, ...], default: T, what: str) -> T:
        """Read a value of the type of `default`."""
        value = self.raw(*keys)
        if value is None:
            return default
        if not isinstance(value, type(default)):
            raise self.fault(f"{keys[0]} is {show(value, 40)}; it must be {what}")
        return value

    def flag(self, *keys: str, default: bool) -> bool:
        """Read true or false; ``null`` is refused where it would not mean the default, for it is as good as false."""
        if default and self.raw(*keys) is None and (nulls := [key for key in keys if key in self._config]):
            raise self.fault(f"{nulls[0]} is null; it must be true or false")
        return self._typed(keys, default, "true or false")

    def text(self, *keys: str, default: str) -> str:
        """Read a string."""
        return self._typed(keys, default, "text")

    def mapping(self, *keys: str) -> dict[str, Any] | None:
        """Read an object, or None."""
        value = self.raw(*keys)
        if value is not None and not isinstance(value, Mapping):
            raise self.fault(f"{keys[0]} must be an object")
        return None if value is None else dict(value)

    def words(self, key: str, length: int, allowed: Sequence[str]) -> tuple[str, ...] | None:
        """Read one of the words `allowed` for each layer, or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < length:
            raise self.fault(f"{key} must be a list with an entry for each of the {length} layers")
        for word in value[:length]:
            if word not in allowed:
                raise self.fault(f"{key} has '{show(word, 40)}', supported are {', '.join(allowed)}")
        return tuple(value[:length])

    def activation(self, *keys: str, default: str) -> Activation:
        """Read an activation function."""
        return self.activation_named(self.text(*keys, default=default), keys[0])

    def activation_named(self, name: str, key: str) -> Activation:
        """The activation function that `key` calls `name`."""
        if name not in _ACTIVATIONS:
            raise self.fault(f"{key} is '{show(name, 40)}', supported are {', '.join(sorted(_ACTIVATIONS))}")
        return _ACTIVATIONS[name]

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse `key` unless it is missing, ``null`` or one of `allowed`."""
        value = self.raw(key)
        if value is not None and not any(type(value) is type(item) and value == item for item in allowed):
            raise self.fault(f"{key} is {show(value, 60)}, which is not supported")

    def architectures(self) -> tuple[str, ...]:
        """Class names that saved the checkpoint."""
        value = self.raw("architectures")
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.fault("architectures must be a list of class names")
        return tuple(value)

    def finish(self) -> None:
        """Refuse settings that look like arithmetic, are enabled, and were never read."""
        for key, value in self._config.items():
            if key in self._read or _HARMLESS.search(key) or not _ARITHMETIC.search(key):
                continue
            neutral = value is None or value is False or (isinstance(value, str | list | dict) and not value)
            if neutral or (not isinstance(value, bool) and value in (0, 1)):
                continue
            raise self.fault(
                f"{show(key, 60)} is {show(value, 60)}: this setting may change the computation and is not supported"
            )

    def fault(self, what: str) -> FitError:
        """The error for an unsupported setting."""
        return FitError(
            what, file="config.json", hint=f"the recipe is of model_type '{show(self._config.get('model_type'), 40)}'"
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """The validated sizes of a model: `hidden` is ``D``, `inner` the width of the MLP; `kv_heads` divides `heads`."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int


_SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "inner": ("intermediate_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "max_positions": ("max_position_embeddings",),
}


def read_sizes(
    settings: ModelSettings,
    *,
    vocabulary: int,
    max_positions: int,
    hidden: int = 4096,
    inner: int | None = 11008,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    grouped: bool = True,
    **keys: tuple[str, ...],
) -> Sizes:
    """Read `Sizes`; the numbers are the family's defaults.

    `inner` is four times ``hidden`` if None. `kv_heads` and `head_dim` hold where the key is missing: None for as many as
    heads, as ``null`` always means, and for ``hidden / heads``; unless `grouped`, the family has neither key. `keys` are
    its own keys of a size where they are not Llama's: ``hidden_keys=("n_embd", "hidden_size")``.

    Raises:
        FitError: a size is invalid, or the heads do not divide.
    """
    named = {size: keys.get(f"{size}_keys", own) for size, own in _SIZE_KEYS.items()}
    width = settings.count(*named["hidden"], default=hidden)
    queries = settings.count(*named["heads"], default=heads, most=_MOST_HEADS)
    groups = (settings.optional_count("num_key_value_heads", kv_heads) if grouped else None) or queries
    per_head = settings.optional_count("head_dim", head_dim) if grouped else None
    if per_head is None:
        if width % queries:
            raise settings.fault(f"{named['hidden'][0]} {width} is not a multiple of {named['heads'][0]} {queries}")
        per_head = width // queries
    if queries % groups:
        raise settings.fault(f"{named['heads'][0]} {queries} is not a multiple of num_key_value_heads {groups}")
    return Sizes(
        hidden=width,
        inner=settings.count(*named["inner"], default=4 * width if inner is None else inner),
        layers=settings.count(*named["layers"], default=layers, most=MOST_LAYERS),
        heads=queries,
        kv_heads=groups,
        head_dim=per_head,
        vocabulary=settings.count("vocab_size", default=vocabulary),
        max_positions=settings.count(*named["max_positions"], default=max_positions),
    )
