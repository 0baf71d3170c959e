# SPDX-License-Identifier: Apache-2.0
"""What we write for diffusers: files of three spellings, bases in two layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import surgery
from tests.loaders.acting import Trial, python_of, start

__all__ = ["ACTS", "Act", "trials"]


@dataclass(frozen=True)
class Act:
    """One file.

    Attributes:
        family: Of the pipeline.
        source: A folder of PEFT's (``peft``: a LoRA, ``dora``, ``loha``, ``lokr``), or ``original``: a LoRA file in the
            release's names.
        to: Its format.
        named: The base that gives the names: ``pipeline``, or ``single``, the release's file.
        into: The base into which it is merged.
    """

    family: str
    source: str
    to: str
    named: str = "pipeline"
    into: str = "pipeline"

    def __str__(self) -> str:
        return f"{self.family}: {self.source} to {self.to}" + (" into one file" if self.into == "single" else "")


_ALL = (
    "sd15",
    "sdxl",
    "sd3",
    "flux",
    "chroma",
    "flux2",
    "wan",
    "wan-i2v",
    "qwen-image",
    "z-image",
    "hunyuan-video",
    "ltx",
    "lumina2",
)
_FUSED = ("flux2", "z-image")  # whose releases hold q, k and v as one
_RELEASED = ("sd15", "sdxl", "sd3", *_FUSED, "wan", "wan-i2v", "qwen-image", "ltx")
_OF_TRAINERS = (*_FUSED, "wan", "wan-i2v", "qwen-image")  # whose files by kohya or musubi-tuner diffusers reads
_WITH_ALPHA = ("wan", "wan-i2v", "qwen-image")  # and by ComfyUI: it refuses, or passes over, the alphas of the others

_DIFFUSERS: Sequence[Act] = [
    *(Act(family, "peft", "diffusers") for family in _ALL),
    Act("sd15", "dora", "diffusers"),
    *(Act(family, "original", "diffusers", into="single") for family in _RELEASED),
    *(Act(family, "peft", "kohya") for family in ("sd15", "sdxl", "flux-wide")),
    *(Act(family, "peft", "kohya", into="single") for family in ("sd15", "sdxl")),
    *(Act(family, "peft", "kohya", "single", "single") for family in _OF_TRAINERS),
    *(Act(family, "original", "kohya", "single", "single") for family in _OF_TRAINERS),
    *(Act(family, "peft", "comfyui", "single", "single") for family in _WITH_ALPHA),
    *(Act(family, "original", "comfyui", "single", "single") for family in _WITH_ALPHA),
]
"""What acts in diffusers 0.42.1. It has no reader for other files of kohya's or ComfyUI's: of SD3, LTX-Video, HunyuanVideo, Lumina 2 they
do nothing or are refused; so do those of ComfyUI of Flux. Widths of Flux, Chroma, HunyuanVideo and Lumina 2 are fixed in its
conversion of a release."""

ACTS: Mapping[str, Sequence[Act]] = {
    "diffusers": _DIFFUSERS,
    "lycoris": [Act("sd15", kind, "kohya") for kind in ("peft", "dora", "loha", "lokr")],
}
"""What each program is given."""


def _trial(act: Act, made: Path, folder: Path) -> Trial:
    source = made / ("original.safetensors" if act.source == "original" else act.source)
    pipeline = made / "pipeline"
    base = pipeline if act.named == "pipeline" else made / "single.safetensors"
    written, merged = folder / "written.safetensors", folder / "merged"
    part = "unet" if (pipeline / "unet").exists() else "transformer"
    component = {"component": part} if base == pipeline and act.source != "original" else {}
    folder.mkdir(parents=True)
    surgery.convert(source, act.to, output=written, base=base, **component)
    dense = made / f"dense-{act.source}"
    if act.into == "pipeline":
        surgery.merge(pipeline, written, output=merged)
        return Trial(pipeline, dense, written, merged)
    surgery.merge(made / "single.safetensors", written, output=merged)
    (merged / "pipeline").symlink_to(pipeline)
    return Trial(pipeline, dense, written, merged / "single.safetensors")


def trials(consumer: str, folder: Path) -> dict[str, Trial]:
    """Everything that diffusers, or lycoris-lora beside it, is given."""
    acts = ACTS[consumer]
    folder.mkdir(parents=True)
    script = Path(__file__).with_name("denoisers.py")
    start([*python_of(consumer), str(script), str(folder), *sorted({act.family for act in acts})])
    return {str(act): _trial(act, folder / act.family, folder / str(number)) for number, act in enumerate(acts)}
