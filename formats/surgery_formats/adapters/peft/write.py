# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to a PEFT folder: the only writer of adapter_model.safetensors and adapter_config.json.

It accepts any adapter: read from another format, combined, extracted, or built in memory. The names of its tensors do
not matter; `Site.module_kind`, `Site.kernel` and `Replacement.held` have what PEFT needs beside the equations.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

from surgery_formats.adapters.format import Rendering, Scaling
from surgery_formats.adapters.peft.class_names import called_back, class_names, renamed
from surgery_formats.adapters.peft.dialects.dialect import ExpertDialect
from surgery_formats.adapters.peft.dialects.writing import needed_dialect, put_experts
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import HEADS, ROOT
from surgery_formats.adapters.peft.kinds import kinds, switches
from surgery_formats.adapters.peft.kinds.kind import PeftKind
from surgery_formats.adapters.peft.parameters import for_peft
from surgery_formats.adapters.peft.read_config import PeftConfig, parse_config
from surgery_formats.adapters.peft.write_config import adapter_config
from surgery_formats.adapters.writing import copied, surviving_metadata
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing

__all__ = ["TENSOR_FILE", "described", "render_peft"]

TENSOR_FILE = "adapter_model.safetensors"


def render_peft(
    adapter: Adapter, base: Checkpoint | None, scaling: Scaling | None = None, dialect: ExpertDialect | None = None
) -> Rendering:
    """adapter_model.safetensors and adapter_config.json.

    Args:
        adapter: What to write.
        base: The model it is for; needed where names are flattened.
        scaling: How to state ranks and scales; by default as the adapter's own PEFT configuration does, if that is
            still true.
        dialect: How to hold experts; by default as near as possible to how the adapter has them.

    Raises:
        FitError: flattened names and no base, or several parts of a pipeline, of which a PEFT folder can hold one.
    """
    _check_sites(adapter, base)
    own = parse_config(adapter.config, adapter.path, switches()) if adapter.format == "peft" else None
    to_class = base is not None and own is None and for_peft("" if dialect is None else dialect.name)
    names = class_names(adapter, base) if base is not None and to_class else {}
    adapter = renamed(adapter, names) if names else adapter
    kind = _kind(adapter, own)
    file = PeftFile(kind.name, adapter, base, own, scaling, has_biases="bias" in kind.switches.understood)
    lora = kind is kinds()["LORA"]
    if dialect is None and base is not None and lora:
        dialect = needed_dialect(adapter, base, made_anew=own is None)
    if dialect is not None:
        if not lora:
            raise FitError(f"{dialect.name} has LoRAs, not {kind.name}", file=adapter.path)
        file.dialect, file.spelt, file.rewritten = dialect.name, dialect.named, True
    if adapter.prompt is not None and own is not None:
        file.prefix = ROOT
    updates = [(site, update) for site, chain in adapter.updates.items() for update in chain]
    if not lora:
        file.targets = {site.path.rpartition(".")[0] for site, update in updates if update.kind in kind.writes}
    kind.write(file, updates if dialect is None else put_experts(file, dialect, updates))
    if adapter.prompt is not None and own is not None:
        file.add(copied(adapter.prompt.table.name, adapter.prompt.table))
        file.ledger.keep_prompt(adapter.prompt.table)
    else:
        file.ledger.drop_prompt(adapter)
    rendering = Rendering(
        TENSOR_FILE,
        tuple(file.tensors[name] for name in sorted(file.tensors)),
        surviving_metadata(adapter) | {"format": "pt"},
        {"adapter_config.json": adapter_config(file, dialect)},
        tuple(file.ledger.entries),
        file.ledger.held_in_order(adapter),
    )
    return called_back(rendering, names) if names else rendering


def described(adapter: Adapter, scaling: Scaling | None = None) -> Adapter:
    """`adapter` with the configuration of its folder, and what a reader of the folder would know besides."""
    (written,) = render_peft(adapter, None, scaling).small_files.values()
    config = json.loads(written)
    return replace(
        adapter,
        config=config,
        new_modules=adapter.new_modules | HEADS | set(config["modules_to_save"] or ()),
        stated_issues=tuple(kinds()[config["peft_type"]].issues(config, ())),
    )


def _kind(adapter: Adapter, own: PeftConfig | None) -> PeftKind:
    """The kind that holds the adapter: its own while that does, else the one that holds most of it."""
    known = kinds()
    count = Counter(update.kind for chain in adapter.updates.values() for update in chain)
    named = known.get(own.kind if own else adapter.kind)
    if named is not None and (own is not None or count.keys() <= named.writes):
        return named
    if count.keys() == known["BEFT"].writes:  # LORA too has additions to biases, but only beside LoRAs
        return known["BEFT"]
    return max(known.values(), key=lambda kind: sum(count[update] for update in kind.writes))


def _check_sites(adapter: Adapter, base: Checkpoint | None) -> None:
    components = sorted({site.component for site in adapter.updates})
    if len(components) > 1:
        raise FitError(
            f"a PEFT folder holds one model's adapter, this one has {listing(components)}",
            file=adapter.path,
            hint="choose one with `component=`",
        )
    if base is None and any(site.flat for site in adapter.updates):
        raise FitError(
            "its module names are flattened: only the base tells them apart",
            file=adapter.path,
            hint="give it with `base=`",
        )
