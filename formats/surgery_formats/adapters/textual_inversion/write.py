# SPDX-License-Identifier: Apache-2.0
"""Write a textual inversion in either layout.

A1111 and ComfyUI call a token by the name of its file, so the token goes into the header, where it survives the way to diffusers.
"""

from __future__ import annotations

from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.grammar.spelling import BUNDLE
from surgery_formats.adapters.textual_inversion.files import ENCODERS, OF_ONE
from surgery_formats.adapters.textual_inversion.read import KIND
from surgery_formats.adapters.writing import ConversionLedger, factor_tensor, surviving_metadata
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.updates import Unmerged

__all__ = ["render_textual_inversion"]


def render_textual_inversion(adapter: Adapter, layout: str) -> Rendering:
    """One file; what is no token embedding is dropped."""
    ledger = ConversionLedger()
    tensors: list[NewTensor] = []
    token = str(adapter.config.get("token", "")) or adapter.path.name.partition(".")[0]
    encoders = {site.component for site, chain in adapter.updates.items() if any(u.kind == KIND for u in chain)}
    names = {component: name for name, component in ENCODERS.items()}
    for site, chain in adapter.updates.items():
        for update in chain:
            if not isinstance(update, Unmerged) or update.kind != KIND:
                ledger.drop(site, update, "a textual inversion has rows for one token, and nothing else")
                continue
            if site.path.startswith(BUNDLE):
                ledger.drop(site, update, "its rows lie in a bundle: combine the file for them alone, and convert that")
                continue
            if layout == "learned-embeds" and len(encoders) > 1:
                ledger.drop(
                    site,
                    update,
                    "a file of diffusers has the rows for one text encoder: convert one component at a time",
                )
                continue
            single = OF_ONE if layout == "embedding" and encoders <= {"", "text_encoder"} else names.get(site.component)
            (_, rows), *_ = update.held
            tensors.append(factor_tensor(token if layout == "learned-embeds" else single or OF_ONE, rows, rows.shape))
            ledger.keep(site, update, "exact", tensors[-1].name)
    ledger.drop_prompt(adapter)
    said = {"token": token} if layout == "embedding" else {}
    file = "embedding.safetensors" if layout == "embedding" else "learned_embeds.safetensors"
    return Rendering(
        file,
        tuple(tensors),
        {**surviving_metadata(adapter), **said},
        entries=tuple(ledger.entries),
        held=ledger.held,
    )
