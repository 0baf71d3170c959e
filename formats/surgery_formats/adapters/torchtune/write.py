# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form as torchtune's own folder: ``adapter_model.pt`` and the configuration beside it.

torchtune builds all layers with one rank and alpha, so smaller ranks are padded with zeros and other scales multiplied into
``lora_b``.
"""

from __future__ import annotations

import json

from surgery_formats.adapters.alphas import written_alpha
from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.packing import packed_as_torch
from surgery_formats.adapters.torchtune.files import HEADS, MODULES, TENSOR_FILE, UNPAIRED
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    factor_tensor,
    places_of,
    whole_place,
    zero_padded,
)
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import DoRA, LoRA, PairedRows, Update, head_rows, paired

__all__ = ["render_torchtune"]

_OURS = {theirs: own for own, theirs in MODULES.items()}
_READ = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")
"""Models that torchtune has, and takes with one LoRA for each projection."""


def render_torchtune(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """A folder. Only LoRA or DoRA of linear layers and the head has a place in it.

    Raises:
        FitError: no base is given, or torchtune has no such model.
    """
    _check_base(adapter, base)
    ledger = ConversionLedger()
    found: list[tuple[Site, Update, Contents, str, LoRA | DoRA]] = []
    taken: set[str] = set()
    chains = [(site, update) for site, chain in adapter.updates.items() for update in chain]
    dora = any(contents_of(_as_stored(update, adapter)).dora for _, update in chains)
    for site, update in chains:
        held = contents_of(_as_stored(update, adapter))
        module = "" if (why := _fault(site, held, dora=dora)) else _module(site, held, base)
        if not why and not module:
            why = "torchtune trains no such module"
        elif module in taken:
            why = "a second one on one module"
        if why:
            ledger.drop(site, update, why)
            continue
        known = held.dora or held.lora
        assert known is not None
        taken.add(module)
        found.append((site, update, held, module, _in_pairs(module, known, base)))
    ledger.drop_prompt(adapter)
    loras = [known.direction if isinstance(known, DoRA) else known for *_, known in found]
    rank = max((lora.rank for lora in loras), default=1)
    scale = commonest(lora.scale for lora in loras if lora.scale) or 1.0
    tensors: list[NewTensor] = []
    for (site, update, held, module, known), lora in zip(found, loras, strict=True):
        times = 1.0 if lora.scale == scale else lora.scale / scale
        said = [f"scale {lora.scale:g} / {scale:g}"] if times != 1.0 else []
        said += [f"rank {lora.rank} padded to {rank}"] if lora.rank != rank else []
        said += [held.folded] if held.folded else []
        ledger.keep(site, update, "folded" if said else "exact", ", ".join(said))
        out, inputs = lora.shape
        tensors += [
            factor_tensor(f"{module}.lora_a.weight", lora.A, (rank, inputs), lambda t: zero_padded(t, 0, rank)),
            factor_tensor(
                f"{module}.lora_b.weight", lora.B, (out, rank), lambda t: zero_padded(t, 1, rank), times=times
            ),
        ]
        if isinstance(known, DoRA):
            tensors.append(factor_tensor(f"{module}.magnitude", known.magnitude, (out,)))
    targets = sorted({module.rpartition(".")[2] for *_, module, _ in found})
    config = {
        "r": rank,
        "lora_alpha": written_alpha(scale * rank),
        "target_modules": [_OURS_LAST.get(name, name) for name in targets],
        "peft_type": "LORA",
        **({"base_model_name_or_path": adapter.base_name} if adapter.base_name else {}),
    }
    small = {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    return Rendering(
        TENSOR_FILE, tuple(tensors), {}, small, tuple(ledger.entries), ledger.held, packing=packed_as_torch
    )


_OURS_LAST = {own.rpartition(".")[2]: theirs.rpartition(".")[2] for own, theirs in MODULES.items()} | {
    "output": "lm_head"
}


def _check_base(adapter: Adapter, base: Checkpoint | None) -> None:
    if base is None:
        if adapter.format == "torchtune" and _keeps_rows(adapter):
            return
        raise FitError(
            "rows of torchtune's queries and keys lie as the base's family has them",
            file=adapter.path,
            hint="give the base with `base=`",
        )
    if base.is_pipeline or base.main.config.get("model_type") not in _READ:
        raise FitError("torchtune has no such model with LoRA", file=base.path, hint=f"it has {', '.join(_READ)}")


def _keeps_rows(adapter: Adapter) -> bool:
    """Whether all queries and keys have their rows as the file has them, which a config.json beside it would undo."""
    sites = (site for site in adapter.updates if site.path.endswith(("q_proj.weight", "k_proj.weight")))
    return all(isinstance(update, PairedRows) for site in sites for update in adapter.updates[site])


def _as_stored(update: Update, adapter: Adapter) -> Update:
    """Of a file that is written again without a base: with its rows as they are."""
    own = adapter.format == "torchtune" and isinstance(update, PairedRows)
    return update.update if own and isinstance(update, PairedRows) else update


def _fault(site: Site, held: Contents, *, dora: bool) -> str:
    """Why the format cannot hold an update; empty if it can."""
    if site.flat or site.component:
        return "torchtune has language models only"
    if held.lora is None:
        return f"this format has no {held.update.kind}"
    if dora and not held.dora:
        return "one recipe trains either LoRA or DoRA"
    if held.dora and not held.dora.per_row:
        return "its magnitudes belong to columns, this format's to rows"
    if site.kernel or not site.path.endswith(".weight"):
        return "this format has linear layers alone"
    return ""


def _module(site: Site, held: Contents, base: Checkpoint | None) -> str:
    """The module's name there; empty for a module it does not train."""
    path = site.path
    if base is not None:
        place = whole_place(places_of(site, base, held.update.tensors))
        if place is None:
            return ""
        path = place[0]
    if path in ("lm_head.weight", "output.weight"):
        tied = base is not None and base.main.tied  # its head is the embedding, which torchtune does not train
        return "" if tied else "output"
    at, _, rest = path.removeprefix("model.").removesuffix(".weight").partition("layers.")
    number, _, module = rest.partition(".")
    return f"layers.{number}.{_OURS[module]}" if not at and number.isdecimal() and module in _OURS else ""


def _in_pairs(module: str, known: LoRA | DoRA, base: Checkpoint | None) -> LoRA | DoRA:
    role = HEADS.get(module.partition(".")[2].partition(".")[2])
    if role is None or base is None or base.main.config.get("model_type") in UNPAIRED:
        return known
    return paired(known, head_rows(base.main.config, role, known.shape[0], known.tensors[0]))
