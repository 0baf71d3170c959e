# SPDX-License-Identifier: Apache-2.0
"""What to do with a merged model: the loader of its class, under the variant that its files are called by."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from surgery.engine.plan import Plan
from surgery.reports.output import PATH
from surgery.reports.values import Name
from surgery_formats.errors import SurgeryError
from surgery_formats.files.bounded_json import parse_object, read_object
from surgery_formats.models.layouts.parts import parts_of
from surgery_formats.models.layouts.registry import indexes_of

if TYPE_CHECKING:
    from surgery.engine.quantised.residual import ResidualLoRA

__all__ = ["next_step"]

_TASKS = (
    "CausalLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MaskedLM",
    "MultipleChoice",
)
"""What classes of transformers are called after, ``LlamaForCausalLM``, where a class that finds them is too."""
_PIPELINES = (
    ("UNet2DConditionModel", ("text_encoder", "text_encoder_2"), "StableDiffusionXLPipeline"),
    ("UNet2DConditionModel", ("text_encoder_2",), "StableDiffusionXLImg2ImgPipeline"),  # the refiner
    ("UNet2DConditionModel", ("text_encoder",), "StableDiffusionPipeline"),
    ("SD3Transformer2DModel", ("text_encoder", "text_encoder_2"), "StableDiffusion3Pipeline"),
)
"""Pipelines that take their text encoders from the file: the network, what text encoders there are, the class."""
_VARIANT = re.compile(
    r"(?:.*/)?(?:model|pytorch_model|diffusion_pytorch_model)\.([a-z]\w*)(?:-\d+-of-\d+)?\.safetensors"
)


def next_step(plan: Plan, output: Path, residual: ResidualLoRA | None) -> tuple[str | Name, ...]:
    """A sentence with a command, for the summary of a merge."""
    names = {side.name for side in plan.side_files}
    path = Name(output, PATH)
    found = next(filter(None, (_VARIANT.fullmatch(file.name) for file in plan.files)), None)
    end = f'", variant="{found[1]}")' if found else '")'
    if residual is not None:  # the weights alone lack the update
        lora = Name(output / "adapter", PATH)
        if plan.files and plan.files[0].name.endswith(".gguf"):
            return "use the model with its LoRA, in GGUF for llama.cpp: convert_lora_to_gguf.py ", lora
        return 'load the model, and attach the LoRA to it: PeftModel.from_pretrained(model, "', lora, '")'
    if "model_index.json" in names:
        return 'load it with diffusers: DiffusionPipeline.from_pretrained("', path, end
    if plan.files and plan.files[0].name.endswith(".gguf"):
        return 'run it with llama.cpp: llama-cli -m "', Name(output / plan.files[0].name, PATH), '"'
    if "modules.json" in names:
        return 'load it with sentence-transformers: SentenceTransformer("', path, '")'
    if "config.json" in names:
        config = _written_config(plan)
        if _is_identifier(network := config.get("_class_name")):
            return f'load it with diffusers: {network}.from_pretrained("', path, end
        return f'load it with transformers: {_loader(config)}.from_pretrained("', path, end
    if len(plan.files) == 1 and (loader := _single_file_loader({tensor.weight for tensor in plan.weights})):
        return f'load it with diffusers: {loader}.from_single_file("', Name(output / plan.files[0].name, PATH), '")'
    return "look at it: surgery inspect ", path


def _single_file_loader(names: Collection[str]) -> str:
    """The class of diffusers that reads one file with these names; empty if they are of no network, or of several.

    Of a file with text encoders it is a pipeline, where that takes them from the file (diffusers 0.42.1,
    ``SINGLE_FILE_LOADABLE_CLASSES`` and ``FromSingleFileMixin``).
    """
    parts = {part.component: part.prefix for part in parts_of(names)}
    if "denoiser" not in parts:
        return ""
    prefix = parts["denoiser"]
    below = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    networks = [index.network for index in indexes_of(below, {})]
    if len(networks) != 1:
        return ""
    network = networks[0].class_of(below)
    encoders = tuple(part for part in parts if part.startswith("text_encoder"))
    return next(
        (one for name, marks, one in _PIPELINES if name == network and encoders[: len(marks)] == marks), network
    )


def _written_config(plan: Plan) -> Mapping[str, Any]:
    """config.json as the output has it: a head for a task makes the model one of another class."""
    side = next(side for side in plan.side_files if side.name == "config.json")
    try:
        return read_object(side.source) if side.source is not None else parse_object(side.data, file=side.name)
    except SurgeryError:
        return {}


def _is_identifier(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name.isidentifier() and name.isascii()


def _loader(config: Mapping[str, Any]) -> str:
    """The class that loads it: one that finds the class by the task, else the class itself."""
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else ""
    if not _is_identifier(name):
        return "AutoModel"
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    if task := next((task for task in _TASKS if name.endswith(f"For{task}")), ""):
        return f"AutoModelFor{task}"
    return "AutoModel" if "auto_map" in config else name  # the model's own code has its class
