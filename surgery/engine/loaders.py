# SPDX-License-Identifier: Apache-2.0
"""Classes and calls that load a model, or an adapter onto one, for the last line of a summary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from surgery.reports.output import PATH
from surgery.reports.values import Name
from surgery_formats.adapters.format import Format
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.files.remote.path import is_remote
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.denoisers import denoiser_of
from surgery_formats.models.layouts.parts import parts_of
from surgery_formats.models.layouts.registry import indexes_of

__all__ = ["attaching", "class_of_config", "class_of_file", "is_identifier"]

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

_OF_FILE = {
    "comfyui": ("put it into the folder models/loras of ComfyUI, for its node LoraLoader: ", ""),
    "embedding": ("put it into the folder embeddings of ComfyUI, Forge or A1111; the file's name is the token: ", ""),
    "gguf": ('run it with llama.cpp, beside the base: llama-cli -m base.gguf --lora "', '"'),
    "keras": ('load it with KerasHub, after backbone.enable_lora: backbone.load_lora_weights("', '")'),
    "learned-embeds": ('load it with diffusers: pipe.load_textual_inversion("', '")'),
    "litgpt": (
        'load it into litgpt.lora.GPT: model.load_state_dict(torch.load("',
        '", weights_only=True)["model"], strict=False)',
    ),
    "loralib": (
        'load it into a model with layers of loralib: model.load_state_dict(torch.load("',
        '", weights_only=True), strict=False)',
    ),
    "onnx-adapter": ('load it with onnxruntime: adapter = LoraAdapter(); adapter.Load("', '")'),
    "torchtune": (
        'load it into a model of torchtune with LoRA: model.load_state_dict(torch.load("',
        '", weights_only=True), strict=False)',
    ),
}
"""What loads the file of weights, by format: the words in front of its path, and those behind it."""
_OF_FOLDER = {
    "adapterhub": ('load it with adapters: model.load_adapter("', '", use_safetensors=True)'),
    "tensorrt-llm": (
        "give it to Triton with inflight_batcher_llm_client.py of tensorrtllm_backend: --lora-task-id 1 --lora-path ",
        "",
    ),
}


def is_identifier(name: object) -> TypeGuard[str]:
    """Whether a name out of a configuration can stand in a command."""
    return isinstance(name, str) and name.isidentifier() and name.isascii()


def class_of_config(config: Mapping[str, Any]) -> str:
    """The class of diffusers or transformers that loads a folder: one that finds the class by the task, else the class."""
    if is_identifier(network := config.get("_class_name")):
        return network
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else ""
    if not is_identifier(name):
        return "AutoModel"
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    if task := next((task for task in _TASKS if name.endswith(f"For{task}")), ""):
        return f"AutoModelFor{task}"
    return "AutoModel" if "auto_map" in config else name  # the model's own code has its class


def class_of_file(names: Collection[str]) -> str:
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


def attaching(
    target: Format, output: Path, tensor_file: str, adapter: Adapter, base: Checkpoint | None
) -> tuple[str | Name, ...]:
    """How to load what is written at `output`, in `tensor_file` of a folder; empty for formats that no one call loads."""
    path, name = Name(output, PATH), target.name
    if is_remote(output):  # programs load what lies on a disk
        return ()
    if around := _OF_FOLDER.get(name):
        return around[0], path, around[1]
    if name == "comfyui" and not _of_diffusion(adapter):
        command = Name("surgery check BASE ", PATH), path, " --for comfyui"
        return "ComfyUI loads LoRAs of diffusion models, and this is of none that is known: see ", *command
    if around := _OF_FILE.get(name):
        return around[0], path if target.single_file else Name(output / tensor_file, PATH), around[1]
    kinds = {update.kind for chain in adapter.updates.values() for update in chain}
    if name == "peft":
        return "attach it: PeftModel.from_pretrained(", *_model(adapter, base), ', "', path, '")'
    if name in ("kohya", "diffusers") and kinds <= {"LoRA", "DoRA"}:
        return 'load it with diffusers: pipe.load_lora_weights("', path, '")'
    if name == "mlx":
        model = "model" if base is None else Name(base.path, PATH)
        return 'load it with MLX-LM: mlx_lm.load("', model, '", adapter_path="', path, '")'
    return ()


def _of_diffusion(adapter: Adapter) -> bool:
    """Whether an adapter names a part of a pipeline, or modules of a diffusion network."""
    named = any(site.component for site in adapter.updates)
    return named or denoiser_of(site.path.rpartition(".")[0] for site in adapter.updates) is not None


def _model(adapter: Adapter, base: Checkpoint | None) -> tuple[str | Name, ...]:
    """The model that PEFT attaches an adapter to, as an expression."""
    components = {site.component for site in adapter.updates} - {""}
    if len(components) == 1 and is_identifier(part := next(iter(components))):
        return (f"pipe.{part}",)
    config = {} if base is None or base.is_pipeline else base.main.config
    if base is None or not config:
        return ("model",)
    return f'{class_of_config(config)}.from_pretrained("', Name(base.path, PATH), '")'
