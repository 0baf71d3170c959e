# SPDX-License-Identifier: Apache-2.0
"""Activations by the names that transformers gives them (``transformers/activations.py``), for kinds with a network inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from surgery_formats.arrays import Array

__all__ = ["ACTIVATIONS", "activation"]


def _sigmoid(x: Array) -> Array:
    import numpy

    with numpy.errstate(over="ignore"):  # of values far below 0, whose sigmoid is 0
        return 1 / (1 + numpy.exp(-x))


def _normal_share(x: Array) -> Array:
    """How much of a normal distribution lies below x."""
    import numpy

    erf = numpy.fromiter(map(math.erf, (x / math.sqrt(2)).ravel().tolist()), float, x.size).reshape(x.shape)
    return (1 + erf) / 2


def _gelu(x: Array) -> Array:
    return x * _normal_share(x)


def _gelu_tanh(x: Array) -> Array:
    import numpy

    return x * (1 + numpy.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _tanh(x: Array) -> Array:
    import numpy

    return numpy.tanh(x)


def _softplus(x: Array) -> Array:
    import numpy

    return numpy.logaddexp(0, x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": lambda x: x.clip(min=0),
    "relu2": lambda x: x.clip(min=0) ** 2,
    "relu6": lambda x: x.clip(0, 6),
    "leaky_relu": lambda x: x.clip(min=0) + 0.01 * x.clip(max=0),
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: _gelu(x).clip(-10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "mish": lambda x: x * _tanh(_softplus(x)),
    "hardswish": lambda x: x * (x + 3).clip(0, 6) / 6,
    "laplace": lambda x: _normal_share((x - 0.707107) / 0.282095),
    "sqrtsoftplus": lambda x: _softplus(x) ** 0.5,
    "linear": lambda x: x,
}
"""On numpy arrays in float64."""


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of that name.

    Raises:
        KeyError: it is not known; readers ask `ACTIVATIONS` first.
    """
    return ACTIVATIONS[name]
