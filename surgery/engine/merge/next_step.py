# SPDX-License-Identifier: Apache-2.0
"""What to do with a merged model: the loader of its class, under the variant that its files are called by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.loaders import class_of_config, class_of_file, is_identifier
from surgery.engine.plan import Plan
from surgery.reports.output import PATH
from surgery.reports.values import Name
from surgery_formats.errors import SurgeryError
from surgery_formats.files.bounded_json import parse_object, read_object
from surgery_formats.files.remote.path import is_remote

if TYPE_CHECKING:
    from surgery.engine.quantised.residual import ResidualLoRA

__all__ = ["next_step"]

_VARIANT = re.compile(
    r"(?:.*/)?(?:model|pytorch_model|diffusion_pytorch_model)\.([a-z]\w*)(?:-\d+-of-\d+)?\.safetensors"
)


def next_step(plan: Plan, output: Path, residual: ResidualLoRA | None) -> tuple[str | Name, ...]:
    """A sentence with a command, for the summary of a merge."""
    names = {side.name for side in plan.side_files}
    path = Name(output, PATH)
    if is_remote(output):  # libraries load what lies on a disk
        return "look at it: surgery inspect ", path
    found = next(filter(None, (_VARIANT.fullmatch(file.name) for file in plan.files)), None)
    end = f'", variant="{found[1]}")' if found else '")'
    if residual is not None:  # the weights alone lack the update
        lora = Name(output / "adapter", PATH)
        if plan.files and plan.files[0].name.endswith(".gguf"):
            return "use the model with its LoRA, in GGUF for llama.cpp: convert_lora_to_gguf.py ", lora
        return 'load the model, and attach the LoRA to it: PeftModel.from_pretrained(model, "', lora, '")'
    # config.json beside a graph is of the model it was exported from
    if plan.files and plan.files[0].name.endswith(".onnx"):
        return 'run it with onnxruntime: InferenceSession("', Name(output / plan.files[0].name, PATH), '")'
    if "model_index.json" in names:
        return 'load it with diffusers: DiffusionPipeline.from_pretrained("', path, end
    if plan.files and plan.files[0].name.endswith(".gguf"):
        return 'run it with llama.cpp: llama-cli -m "', Name(output / plan.files[0].name, PATH), '"'
    if "modules.json" in names:
        return 'load it with sentence-transformers: SentenceTransformer("', path, '")'
    if "config.json" in names:
        config = _written_config(plan)
        library = "diffusers" if is_identifier(config.get("_class_name")) else "transformers"
        return f'load it with {library}: {class_of_config(config)}.from_pretrained("', path, end
    if len(plan.files) == 1 and (loader := class_of_file({tensor.weight for tensor in plan.weights})):
        return f'load it with diffusers: {loader}.from_single_file("', Name(output / plan.files[0].name, PATH), '")'
    return "look at it: surgery inspect ", path


def _written_config(plan: Plan) -> Mapping[str, Any]:
    """config.json as the output has it: a head for a task makes the model one of another class."""
    side = next(side for side in plan.side_files if side.name == "config.json")
    try:
        return read_object(side.source) if side.source is not None else parse_object(side.data, file=side.name)
    except SurgeryError:
        return {}
