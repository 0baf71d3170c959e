# SPDX-License-Identifier: Apache-2.0
"""Files that lie beside adapters in people's folders and that no weight can hold: what they are, and what to do with them.

They are told by the names of their tensors, as `factor_names` tells factors, and whole models of Keras by their endings. Every
command names them in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.hdf5 import SIGNATURE as HDF5
from surgery_formats.containers.torch import TORCH
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.files.raw import first_bytes, open_file

__all__ = ["KNOWN_FILES", "KnownFile", "known_file", "known_file_at", "refuse_known"]


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A family of files.

    Attributes:
        what: What it is, and why it is not read as an adapter.
        instead: What to do with it.
        marks: Texts, each of which is in some name.
        every: A pattern that all names match; empty for any.
        without: Texts that are in no name.
        network: Whether it is a network in full: a model where one is wanted, and no adapter. A LoRA of it is another file.
    """

    what: str
    instead: str
    marks: tuple[str, ...]
    every: str = ""
    without: tuple[str, ...] = ()
    network: bool = False

    def is_of(self, names: Collection[str], joined: str) -> bool:
        """Whether a file with these tensors is one; `joined` has their names below each other, searched as one text."""
        without = (*self.without, "lora") if self.network else self.without
        if not all(mark in joined for mark in self.marks) or any(mark in joined for mark in without):
            return False
        return not self.every or all(re.fullmatch(self.every, name) for name in names)


_IN_UI = "load it beside the base, in ComfyUI or diffusers"
_CONTROLNET = "a ControlNet: a network of its own beside the denoiser, no adapter"

KNOWN_FILES = (
    KnownFile(
        "an IP-Adapter: new modules, which no weight of a base can hold",
        f"{_IN_UI} (load_ip_adapter)",
        ("ip_adapter",),
        r"(image_proj\w*|ip_adapter\w*|adapter_modules)(\..*)?|.*\.(ip_adapter_\w+|to_[kv]_ip)(\..*)?",
    ),
    KnownFile(
        "PuLID: new modules, which no weight of a base can hold",
        _IN_UI,
        ("pulid_encoder",),
        r"(pulid|id_adapter)\w*\..*",
    ),
    KnownFile(
        "a Control-LoRA: factors of a ControlNet that is made of the base when it runs",
        "load it in ComfyUI or Forge, which make it",
        ("lora_controlnet",),
    ),
    KnownFile(
        "factors of layerdiffuse, which act beside its own encoder and decoder of transparency",
        "load it with layerdiffuse, in Forge or ComfyUI",
        ("::",),
        r".*::\w+::\d+",
    ),
    KnownFile(
        "ControlNet-LLLite: new modules, which no weight of a base can hold",
        "load it in ComfyUI or with sd-scripts",
        ("lllite_",),
        r"lllite_.*",
    ),
    KnownFile(
        "T-LoRA: its rank follows the step of the sampler, and what its factors began with is not in the file",
        "run it with LyCORIS, or with T-LoRA's own code",
        (".lambda_layer", ".q_layer.weight"),
    ),
    KnownFile(
        "a LoRA that Nunchaku packed for its kernels of 4 bits",
        "take the LoRA that it was made from",
        (".lora_down", ".lora_up"),
        r".*\.lora_(down|up)|.*\.(lora_[AB]\.weight|bias|vectors?)",
        (".qweight", ".wscales"),
    ),
    KnownFile(
        "a hypernetwork: networks with an activation in front of keys and values, which no weight can hold",
        "load it in A1111 or Forge",
        (".linear.0.weight",),
        r"\d+\.[01]\.linear\.\d+\.(weight|bias)",
    ),
    KnownFile(
        "a soft prompt of PEFT's without its adapter_config.json: prompts, prefixes and P-tuning look alike",
        "put adapter_config.json beside it",
        ("prompt_embeddings",),
        r"prompt_embeddings",
    ),
    *(
        KnownFile(
            "weights of AdapterHub without their adapter_config.json, which explains them",
            "name their folder",
            (mark,),
            r"(.*\.)?(loras|adapters|(attention|layer)_text_(task|lang)_adapters|shared_parameters|invertible_\w*adapters|"
            r"prefix_(tunings|gates)|prompt_tunings|refts)\..*",
        )
        for mark in (".loras.", "adapters.", "_tunings.", "refts.")
    ),
    KnownFile(
        "AdapterHub's fusion of several adapters: attention over what they give, which no weight can hold",
        "load it with the library adapters (load_adapter_fusion)",
        ("adapter_fusion_layer.",),
        r".*adapter_fusion_layer\..*",
    ),
    KnownFile(
        "a prediction head of AdapterHub's", "name its folder, with the adapter", ("heads.",), r"heads\.[^.]+\.\d+\..*"
    ),
    KnownFile(_CONTROLNET, _IN_UI, ("input_hint_block.", "zero_convs."), "", ("diffusion_model.",), network=True),
    KnownFile(_CONTROLNET, _IN_UI, ("controlnet_",), "", ("diffusion_model.",), network=True),
    KnownFile(
        "a T2I-Adapter: a network of its own beside the denoiser, no adapter of its weights",
        _IN_UI,
        ("body.0.", "conv_in."),
        r"(adapter\.)?(body\.\d+|conv_in)\..*",
        network=True,
    ),
    KnownFile(
        "a motion module: layers between those of the denoiser, no adapter of its weights",
        f"{_IN_UI} (MotionAdapter)",
        ("motion_modules.",),
        r".*motion_modules\..*",
        network=True,
    ),
)
"""In order: the first that fits is meant."""

_KERAS = KnownFile(
    "a whole model of Keras, into whose kernels Keras adds the LoRAs of its layers when it saves one: no factor is in it",
    "save the LoRA with backbone.save_lora_weights('adapter.lora.h5') where it was trained: what is loaded has none",
    (),
)
_OF_KERAS = {".keras": b"PK\x03\x04", ".weights.h5": HDF5}
"""Endings that Keras asks for, and how such files begin."""


def known_file(names: Collection[str]) -> KnownFile | None:
    """The family of a file with these tensors; None if it is of none."""
    joined = "\n".join(names)
    return next((known for known in KNOWN_FILES if known.is_of(names, joined)), None) if names else None


def known_file_at(path: Path, names: Collection[str] = ()) -> KnownFile | None:
    """The family of the file at `path`, also of a torch file that nests its tensors so that they are no weights.

    Args:
        path: Of the file.
        names: Of its tensors; none where they could not be read as weights.
    """
    for ending, magic in _OF_KERAS.items():
        if path.name.endswith(ending):
            return _KERAS if first_bytes(path, len(magic)) == magic else None
    if names or not path.name.endswith(TORCH.suffixes):
        return known_file(names)
    from surgery_formats.containers.torch.pickle_file import nested_names, read_torch

    try:
        return known_file(nested_names(read_torch(open_file(path))))
    except (SurgeryError, OSError, ValueError):
        return None


def refuse_known(path: Path, names: Collection[str], *, networks: bool) -> None:
    """Say what a file is that no command here takes for an adapter, or a model.

    Args:
        path: Of the file.
        names: Of its tensors; none where they could not be read as weights.
        networks: Whether a network in full is refused too.

    Raises:
        FitError: it is one.
    """
    known = known_file_at(path, names)
    if known is not None and (networks or not known.network):
        raise FitError(known.what, file=path, hint=known.instead)
