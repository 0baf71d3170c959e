# SPDX-License-Identifier: Apache-2.0
"""An adapter that PEFT made for a tiny model of any type, beside what a merge of it must give."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open

import surgery
from tests.oracles import measure, peft_oracle
from tests.support.tiny_models import inputs, output, tiny

__all__ = ["Attached", "Difference", "Outcome", "attach", "difference", "linear_modules", "outcome", "quiet", "stacks"]

_READ_DIRECTLY: Mapping[str, tuple[str, ...]] = {
    "recurrent": ("out_proj", "x_proj", "dt_proj"),
    "mobilebert": ("predictions.dense", "predictions.decoder"),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""Linear modules whose weight the model's code reads without calling them, so that PEFT attaches nothing there."""

_LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)


@dataclass(frozen=True)
class Attached:
    """A base and an adapter on disk, and what PEFT makes of them.

    Attributes:
        made: The model's class.
        folder: With ``adapter``, and the base by each of `layouts`.
        layouts: ``hub``, the names that `save_pretrained` writes, and ``code`` where those of the model's code differ.
        inputs: What it is run on.
        without: What the model gives without the adapter.
        wanted: What it gives with it attached.
        weights: PEFT's own merge, by the names of the model's code. Without tied parameters: PEFT's merge of one changes
            the other too, which the attached adapter does not. Empty for a kind that PEFT does not merge.
    """

    made: Any
    folder: Path
    layouts: tuple[str, ...]
    inputs: Mapping[str, torch.Tensor]
    without: torch.Tensor
    wanted: torch.Tensor
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """How far a merge is from PEFT's.

    Attributes:
        logits: Greatest difference from the attached model's, as a share of the adapter's effect.
        weights: Greatest difference of a weight from PEFT's merge, as a share of the greatest number of that weight.
        weight: Its name.
    """

    logits: float
    weights: float
    weight: str


@dataclass(frozen=True)
class Outcome:
    """What came of merging one adapter.

    Attributes:
        found: Differences by layout of the base.
        refused: What a merge said, by layout.
    """

    found: Mapping[str, Difference]
    refused: Mapping[str, str]

    @property
    def wrong(self) -> dict[str, Difference]:
        """Layouts whose merge is not PEFT's."""
        return {name: one for name, one in self.found.items() if not (one.logits < 1e-3 and one.weights < 2e-5)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What transformers and PEFT say of models that are too small and adapters that are too odd is no news here."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def linear_modules(model: Any) -> list[str]:
    """Paths of linear modules whose output the model takes."""
    recurrent = any("A_log" in name or "mixer" in name or "mamba" in name for name, _ in model.named_parameters())
    read = _READ_DIRECTLY.get("recurrent" if recurrent else model.config.model_type, ())
    left_out = ("lm_head", "router.classifier", *read)
    return [
        name
        for name, one in model.named_modules()
        if isinstance(one, _LINEAR) and _gives_its_product(one) and not name.endswith(left_out)
    ]


def _gives_its_product(module: Any) -> bool:
    """Whether a linear module computes what its class says: some routers give the chosen experts as well, or instead."""
    (plain,) = (kind for kind in _LINEAR if isinstance(module, kind))
    if type(module).forward is plain.forward:
        return True
    inputs = module.weight.shape[0 if plain is not torch.nn.Linear else 1]
    given = torch.randn(1, 2, inputs, generator=torch.Generator().manual_seed(3)).to(module.weight.dtype)
    with torch.no_grad():
        try:
            found = module(given)
        except (TypeError, RuntimeError):  # it takes something else: a row for every group, say
            return False
        return isinstance(found, torch.Tensor) and torch.allclose(found, plain.forward(module, given), atol=1e-6)


def stacks(model: Any) -> list[str]:
    """Parameters that hold all experts of a layer."""
    modules = dict(model.named_modules())
    return sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and ("expert" in name or "moe" in name)
        and not isinstance(modules[name.rpartition(".")[0]], torch.nn.Linear | torch.nn.Conv1d)
    )


def attach(
    model_type: str,
    folder: Path,
    configure: Callable[[Any], peft.PeftConfig],
    randomise: Callable[[Any, torch.Generator], None] = peft_oracle.randomise,
) -> Attached:
    """Write a base and an adapter of it into `folder`.

    Raises:
        ValueError: transformers does not load what it saved.
    """
    model = tiny(model_type, first=("seq2seq", "speech"))
    made = type(model)
    model.save_pretrained(folder / "hub")
    model.save_pretrained(folder / "code", save_original_format=False)
    layouts = ("hub", "code")
    if _names(folder / "hub") == _names(folder / "code"):
        shutil.rmtree(folder / "code")
        layouts = ("hub",)
    model, info = made.from_pretrained(folder / "hub", dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError("transformers does not find what it saved")
    given = inputs(model)
    without = output(model.eval(), given)
    attached = peft.get_peft_model(model, configure(model))
    randomise(attached, torch.Generator().manual_seed(3))
    peft_oracle.forwardable(attached).save_pretrained(folder / "adapter")
    wanted = output(attached, given)
    tied = _tied(model)
    weights: dict[str, torch.Tensor] = {}
    with contextlib.suppress(NotImplementedError):  # a kind that PEFT does not merge either
        merged = attached.merge_and_unload()
        weights = {name: value.double() for name, value in merged.state_dict().items() if name not in tied}
    return Attached(made, folder, layouts, given, without, wanted, weights)


def _tied(model: Any) -> set[str]:
    places: dict[int, list[str]] = {}
    for name, value in model.state_dict().items():
        places.setdefault(value.data_ptr(), []).append(name.replace(".base_layer.", "."))
    return {name for names in places.values() if len(names) > 1 for name in names}


def _names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            found |= set(opened.keys())
    return found


def difference(attached: Attached, layout: str) -> Difference:
    """Merge into the base of a layout, and compare what transformers loads with what PEFT has."""
    folder = attached.folder
    surgery.merge(folder / layout, [folder / "adapter"], output=folder / "merged")
    merged, info = attached.made.from_pretrained(folder / "merged", dtype=torch.float32, output_loading_info=True)
    shutil.rmtree(folder / "merged")
    if info["missing_keys"]:
        return Difference(math.inf, math.inf, min(info["missing_keys"]))
    effect = (attached.wanted - attached.without).abs().max()
    logits = float((output(merged.eval(), attached.inputs) - attached.wanted).abs().max() / effect)
    state = merged.state_dict()
    errors = {name: measure.relative_error(state[name], value) for name, value in attached.weights.items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    return Difference(logits, errors.get(worst, 0.0), worst)


def outcome(attached: Attached) -> Outcome:
    """Merge into the base of every layout."""
    found, refused = {}, {}
    for layout in attached.layouts:
        try:
            found[layout] = difference(attached, layout)
        except surgery.SurgeryError as error:
            refused[layout] = f"{type(error).__name__}: {error}".replace("\n", " ")
    return Outcome(found, refused)
