# SPDX-License-Identifier: Apache-2.0
"""What sd-scripts, musubi-tuner and ComfyUI call the modules of transformers: their makers' names, whatever the base has.

Text encoders have the numbers that sd-scripts gives them: CLIP that of its folder, T5 always the third, and a language model
that is the only one has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.training import restate_network
from surgery_formats.adapters.grammar.writer import render_weight_file
from surgery_formats.adapters.kohya.dialect import DIALECT
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.denoisers import COMPONENTS, denoiser_of
from surgery_formats.models.names import Names
from surgery_formats.updates import low_rank_part

__all__ = ["is_of_a_transformer", "render_for_transformer"]

_NUMBERS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
_T5 = "text_encoder_3"


def is_of_a_transformer(base: Checkpoint) -> bool:
    """Whether the base's denoiser is a transformer of a family whose makers' names are known."""
    names = base.names_of("denoiser")
    family = denoiser_of(name.rpartition(".")[0] for name in names.parameters) if names and names.networks else None
    return family is not None and family.component == "transformer"


def render_for_transformer(adapter: Adapter, base: Checkpoint) -> Rendering:
    """Render an adapter as one kohya file in makers' names; modules that a kohya file had keep their keys.

    Raises:
        FitError: a weight that the base does not have.
    """
    encoders = _encoders(base)
    by_type = {f"{one.config.get('model_type')}:{name}": encoders.get(name) for name, one in base.components.items()}
    dialect = replace(
        DIALECT,
        in_release=True,
        written={**dict.fromkeys(("", *COMPONENTS), "lora_unet_"), **encoders},
        encoders={kind: prefix for kind, prefix in by_type.items() if prefix},
    )
    rendering = render_weight_file(adapter, base, dialect)
    updates = (update for chain in rendering.held.values() for update in chain)
    loras = [lora for update in updates if (lora := low_rank_part(update))]
    if not loras or adapter.format == DIALECT.name:
        return rendering
    metadata = dict(rendering.metadata)
    restate_network(metadata, loras, "networks.lora")
    return replace(rendering, metadata=metadata)


def _encoders(base: Checkpoint) -> Mapping[str, str]:
    """How keys of each text encoder begin."""
    found = dict(_text_encoders(base))
    prefixes = {name: _NUMBERS[name] for name in found if name in _NUMBERS}
    for name, names in found.items():
        if any(parameter.startswith("encoder.block.") for parameter in names.parameters):
            prefixes |= {name: _NUMBERS[_T5], _T5: _NUMBERS[_T5]}
        elif len(found) == 1 and not any("encoder.layers." in parameter for parameter in names.parameters):
            prefixes[name] = "lora_te_"
    return prefixes


def _text_encoders(base: Checkpoint) -> Iterator[tuple[str, Names]]:
    for component in base.components.values():
        names = component.parts if component.parts else {component.name: component.names}
        yield from ((name, own) for name, own in names.items() if name.startswith("text_encoder"))
