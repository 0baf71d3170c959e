# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to a LoRA file of kohya's sd-scripts.

Module names and shapes come from the base. UNets of Stable Diffusion 1 and 2 get the names of diffusers, all other networks
those of their makers, because trainers write them and every loader reads them: see `releases` for transformers. Hashes
``sshs_*`` of a source become those of what is written; tools compute them for files without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.grammar.training import restate_network
from surgery_formats.adapters.grammar.writer import render_weight_file
from surgery_formats.adapters.kohya.dialect import DIALECT
from surgery_formats.adapters.kohya.releases import is_of_a_transformer, render_for_transformer
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    factor_tensor,
    places_of,
    surviving_metadata,
    whole_place,
)
from surgery_formats.arrays import Array
from surgery_formats.binding.sizes import component_of, slices_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.names import Names

__all__ = ["render_kohya"]

_TEXT = "text_model."  # every published text encoder has this level, transformers 5 leaves it out


def render_kohya(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """Render an adapter as one kohya file.

    It holds LoRA and DoRA of linear layers and convolutions, and differences of weights and biases. Other updates are
    dropped. Where there is no base, or its names give the format no name for something, an adapter keeps the keys of the
    files that it came from, and modules of a denoiser get their own names flattened.

    Raises:
        FitError: no base, or a weight it does not have.
    """
    if base is None:
        kept = render_weight_file(adapter, None, DIALECT)
        if adapter.updates and not _dropped(kept):
            return kept
        raise FitError("module names of this format come from the base", file=adapter.path, hint="give it with `base=`")
    if is_of_a_transformer(base):
        return render_for_transformer(adapter, base)
    rendering = _render_with_base_names(adapter, base)
    if _dropped(rendering):
        return min(rendering, render_weight_file(adapter, base, DIALECT), key=_dropped)
    return rendering


def _dropped(rendering: Rendering) -> int:
    return sum(entry.outcome == "dropped" for entry in rendering.entries)


def _render_with_base_names(adapter: Adapter, base: Checkpoint) -> Rendering:
    ledger = ConversionLedger()
    namers = dict(_namers(base))
    known = any(namer.prefix for namer in namers.values())
    fitting: dict[str, _Fitting] = {}
    for site, chain in adapter.updates.items():
        component = component_of(site, base)
        for source in chain:
            held = contents_of(source)
            form = held.lora or held.offset
            where = whole_place(places_of(site, base, form.tensors)) if form else None
            stored = where[0] if where else next((each.parameter.name for each in slices_of(site, base)), "")
            part, name = component.within(stored) if stored else (component.name or site.component, "")
            namer = namers.get(part) or namers.get(component.name, _Namer("", {}))
            why = _fault(held, where, part, namer, name, known=known)
            if why or where is None:
                ledger.drop(site, source, why or "the base holds it in several tensors")
            elif (mark := f"{namer.key(name)}.{_leaf(name, held)}") in fitting:
                ledger.drop(site, source, "a second one of this kind on one module")
            else:
                fitting[mark] = _Fitting(site, held, part, namer.key(name), *where)
    alphas = {} if adapter.format == "kohya" else _common_alphas(fitting.values())
    tensors: dict[str, NewTensor] = {}
    for entry in fitting.values():
        new, folded = _tensors(entry, alphas.get(entry.component))
        tensors |= {tensor.name: tensor for tensor in new}
        folded = ", ".join(filter(None, [entry.held.folded, folded]))
        ledger.keep(entry.site, entry.held.update, "folded" if folded else "exact", folded or entry.key)
    ledger.drop_prompt(adapter)
    metadata = surviving_metadata(adapter, hashed=True)
    loras = [entry.held.lora for entry in fitting.values() if entry.held.lora]
    lycoris = any(name.endswith((".dora_scale", ".diff", ".diff_b")) for name in tensors)
    module = "lycoris.kohya" if lycoris else "networks.lora"
    restate_network(metadata, loras, module, alpha=commonest(alphas.values()))
    ordered = tuple(tensors[name] for name in sorted(tensors))
    return Rendering(f"{adapter.path.stem}.safetensors", ordered, metadata, {}, tuple(ledger.entries), ledger.held)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """An update that the file will hold: where in the base, under which key."""

    site: Site
    held: Contents
    component: str
    key: str
    name: str
    shape: tuple[int, ...]


def _common_alphas(fitting: Iterable[_Fitting]) -> dict[str, float]:
    """One alpha for each part.

    The format allows one per module, but diffusers (0.42) loses those that differ from the commonest.
    """
    by_component: dict[str, list[float]] = {}
    for entry in fitting:
        if lora := entry.held.lora:
            by_component.setdefault(entry.component, []).append(lora.scale * lora.rank)
    return {
        component: alpha for component, alphas in by_component.items() if (alpha := commonest(a for a in alphas if a))
    }


def _leaf(name: str, held: Contents) -> str:
    if held.offset:
        return "diff_b" if name.endswith(".bias") else "diff"
    return "lora_down.weight"


@dataclass(frozen=True, slots=True)
class _Namer:
    """Keys of one network.

    Attributes:
        prefix: ``lora_unet``; empty if the format has none for it.
        called: What modules are called that have another name in this format, flattened; empty if they have none.
    """

    prefix: str
    called: Mapping[str, str]

    def key(self, name: str) -> str:
        """``lora_unet_...`` for a parameter's name in its network; without a module if the format has no name for it."""
        module = name.rpartition(".")[0]
        if self.prefix.startswith("lora_te") and module.startswith("encoder.") and not _is_t5(module):
            module = _TEXT + module
        called = self.called.get(module, module.replace(".", "_"))
        return f"{self.prefix}_{called}" if called else ""


def _is_t5(module: str) -> bool:
    return module.startswith("encoder.block.")


def _namers(base: Checkpoint) -> Iterator[tuple[str, _Namer]]:
    """By component, or by part of a file: Stable Diffusion XL has the original names here, 1 and 2 have diffusers'."""
    for component in base.components.values():
        modules = dict.fromkeys(name.rpartition(".")[0] for name in component.parameters)
        called: dict[str, str] = {}
        if component.family.other_flat and "add_embedding.linear_1" in modules:  # SDXL
            called = {module: flat for flat, module in component.family.other_flat(modules)}
        yield component.name, _Namer(_prefix(component, base), called)
        two = "text_encoder_2" in component.parts
        for part, names in component.parts.items():
            prefix = "lora_te" if part == "text_encoder" and not two else _OF_PARTS.get(part, "")
            keeps = part == "denoiser" and not ("input_blocks.0.0.weight" in names.parameters and not _is_xl(names))
            called = {} if keeps else {n.rpartition(".")[0]: _in_diffusers(n, names) for n in names.parameters}
            yield part, _Namer(prefix, called)


_OF_PARTS = {
    "denoiser": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


def _is_xl(names: Names) -> bool:
    return "label_emb.0.0.weight" in names.parameters


def _in_diffusers(name: str, names: Names) -> str:
    """What diffusers calls a parameter's module, flattened; empty if it holds that in parts, or the other way round."""
    pieces = names.called_by(name, "diffusers")
    return pieces[0].rpartition(".")[0].replace(".", "_") if len(pieces) == 1 else ""


def _prefix(component: Component, base: Checkpoint) -> str:
    two = "text_encoder_2" in base.components
    named = {"unet": "lora_unet", "text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    if component.name in named:
        return named[component.name]
    if not component.name and "UNet2DConditionModel" in component.family.names:
        return "lora_unet"
    if not component.name and "clip_text_model" in component.family.names:
        return "lora_te2" if "text_projection.weight" in component.parameters else "lora_te"
    return ""


def _fault(
    held: Contents,
    where: tuple[str, tuple[int, ...]] | None,
    part: str,
    namer: _Namer,
    name: str,
    *,
    known: bool,
) -> str:
    """Why the format cannot hold an update; empty if it can.

    Args:
        held: The update.
        where: The base's weight, with its sizes, if it is one of its own.
        part: The network that the weight is of.
        namer: Of that network.
        name: Of the weight in it.
        known: Whether the format names any network of the base.
    """
    if not namer.prefix:
        nameless = "it is of no network that this format names" if known else "this format names diffusion models only"
        return f"this format has no name for '{part}'" if part else nameless
    lora, dora = held.lora, held.dora
    if held.whole and not namer.key(name):
        return "it is several weights in one, which this format names apart, as the folder of a pipeline has them"
    if not (lora or held.offset):
        return f"this format has no {held.update.kind}"
    if where is None:
        return ""
    if not namer.key(name):
        return "the base holds it with others in one weight, which this format has names for the parts of"
    _, shape = where
    leaf = name.rpartition(".")[2]
    if leaf == "weight" and ("embed" in name.rpartition(".")[0].rpartition(".")[2] and ".embeddings." in f".{name}"):
        return "this format has no embeddings"
    if leaf not in ("weight", "bias") or (leaf == "bias" and lora):
        return "this format names modules, not parameters"
    if lora and (len(shape) < 2 or lora.shape != (shape[0], math.prod(shape[1:]))):
        return f"it was made for {list(lora.shape)}, the base has {list(shape)}"
    if dora and dora.magnitude.shape[0] != shape[0 if dora.per_row else 1]:
        return "its magnitudes belong to kernel columns"
    return ""


def _tensors(entry: _Fitting, alpha: float | None) -> tuple[list[NewTensor], str]:
    """The tensors of one update, and what was multiplied into which.

    Args:
        entry: The update.
        alpha: What its part's alphas shall be; None to keep each as it is.
    """
    lora, dora, offset, key, shape = entry.held.lora, entry.held.dora, entry.held.offset, entry.key, entry.shape
    if offset:
        leaf = _leaf(entry.name, entry.held)
        folded = f"its scale {offset.scale:g} is in '{leaf}'" if offset.scale != 1.0 else ""
        return [factor_tensor(f"{key}.{leaf}", offset.value, shape, times=offset.scale)], folded
    assert lora is not None
    rank, ones = lora.rank, (1,) * (len(shape) - 2)
    own = lora.scale * rank
    written = own if alpha is None else alpha
    times = 1.0 if abs(own - written) <= 1e-12 * abs(written) else own / written
    new = [
        factor_tensor(f"{key}.lora_down.weight", lora.A, (rank, *shape[1:])),
        factor_tensor(f"{key}.lora_up.weight", lora.B, (shape[0], rank, *ones), times=times),
        _alpha(f"{key}.alpha", written),
    ]
    if dora:
        size = (shape[0], 1, *ones) if dora.per_row else (1, shape[1], *ones)
        new.append(factor_tensor(f"{key}.dora_scale", dora.magnitude, size))
    notes = ["its core is in 'lora_down'"] if len(lora.A.tensors) > 1 else []
    if times != 1.0:
        notes.append(f"{times:g} of its scale is in 'lora_up'")
    elif lora.alpha is not None and abs(lora.alpha - own) > 1e-12 * abs(lora.alpha):
        notes.append(f"its scale is in alpha ({own:g})")
    return new, ", ".join(notes)


def _alpha(name: str, value: float) -> NewTensor:
    def load() -> Array:
        import numpy

        return numpy.array(value)

    return NewTensor(name, DType.F32, (), load)
