# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters that nobody has trained yet, as AdapterHub's library writes them (adapters 1.3.0, ``SeqBnConfig``)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from surgery_formats.errors import FitError

__all__ = ["bottleneck_config", "bottleneck_places"]

_PLACES: Mapping[str, tuple[str, str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), (r"(.*\.|)encoder\.layer\.\d+\.output", "dense", "")),
    **dict.fromkeys(("llama", "mistral"), (r"(.*\.|)layers\.\d+", "mlp.down_proj", ".output_adapters")),
    "gpt2": (r"(.*\.|)h\.\d+", "mlp.c_proj", ".output_adapters"),
    "distilbert": (r"(.*\.|)transformer\.layer\.\d+", "ffn.lin2", ".output_adapters"),
}
"""By model type: the module of a layer, a linear module that it has, and the module of its bottleneck behind the MLP."""
_CLASSES = {
    "bert": "Bert", "distilbert": "DistilBert", "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral",
    "roberta": "Roberta", "xlm-roberta": "XLMRoberta",
}  # fmt: skip
_VERSION = "adapters.1.3.0"


def bottleneck_places(model_type: str, modules: Collection[str]) -> list[str]:
    """Paths of the modules that hold the bottlenecks behind the MLPs, in the order of `modules`.

    Args:
        model_type: Of the base.
        modules: Paths of its linear modules, in the model's code.

    Raises:
        FitError: where the library puts them in this type is not known.
    """
    if model_type not in _PLACES:
        raise FitError(
            f"where AdapterHub's library puts a bottleneck in a model of the type '{model_type}' is not known here",
            hint=f"it is known of {', '.join(sorted(_PLACES))}",
        )
    layer, inside, behind = _PLACES[model_type]
    found = (re.fullmatch(rf"({layer})\.{re.escape(inside)}", module) for module in modules)
    return [f"{match[1]}{behind}" for match in found if match]


def bottleneck_config(name: str, base_name: str, model_type: str, hidden: int, width: int) -> dict[str, Any]:
    """adapter_config.json of a sequential bottleneck of `width` numbers behind every MLP (Pfeiffer et al. 2020).

    Its up projection begins with zeros, as in He et al. 2021: the model begins as the base.

    Raises:
        FitError: the library states a width as a part of `hidden`, and has none that gives it.
    """
    part: float = hidden // width if hidden % width == 0 else hidden / width
    if not 0 < width <= hidden or int(hidden // part) != width:
        raise FitError(f"no bottleneck of {width} numbers in a model of {hidden}", hint="give a rank that divides it")
    own: dict[str, Any] = {
        "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
        "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "mam_adapter",
        "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
        "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
        "non_linearity": "relu", "original_ln_after": True, "original_ln_before": True, "output_adapter": True,
        "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
        "reduction_factor": part, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
        "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
    }  # fmt: skip
    return {
        "config": own,
        "hidden_size": hidden,
        "model_class": f"{_CLASSES[model_type]}AdapterModel",
        "model_name": base_name,
        "model_type": model_type,
        "name": name,
        "version": _VERSION,
    }
