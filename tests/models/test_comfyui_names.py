# SPDX-License-Identifier: Apache-2.0
"""Names under which ComfyUI finds a LoRA's modules: every spelling it has for a network is read, and what is written is one of them.

The spellings are those of ``comfy/lora.py`` at 17358c8f (``model_lora_keys_unet``, ``model_lora_keys_clip``), for the networks that are
here. Which rows of the release's file are diffusers' is diffusers' own word (``tests/golden/layouts``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import convert, merge
from surgery_formats.errors import FitError
from tests.support.adapter_files import Arrays
from tests.support.base_loras import lora_of
from tests.support.bases import KINDS, Weights, draw, drawn, in_comfyui, tensors_of, written

ALWAYS = ("lora_unet_<flat>", "diffusion_model.<own>")
SPELLINGS: dict[str, tuple[str, ...]] = {
    "sd15": ("lycoris_<flat diffusers>", "unet.<processor>", "<processor>"),
    "sdxl": ("lycoris_<flat diffusers>", "unet.<processor>", "<processor>"),
    "sd3": ("transformer.<diffusers>", "lora_transformer_<flat diffusers>", "lycoris_<flat diffusers>"),
    "flux": ("transformer.<diffusers>", "lora_transformer_<flat diffusers>", "lycoris_<flat diffusers>", "<diffusers>"),
    "auraflow": ("transformer.<diffusers>",),
    "hunyuan-video": ("transformer.<release>", "diffusion_model.<release>"),
    "hidream": ("lycoris_<flat>", "transformer.<own>"),
    "qwen-image": ("<own>", "transformer.<own>", "lycoris_<flat>"),
    "krea2": ("diffusion_model.<diffusers>", "transformer.<diffusers>", "lycoris_<flat diffusers>", "<diffusers>"),
    "z-image": ("diffusion_model.<diffusers>", "transformer.<diffusers>", "lycoris_<flat diffusers>", "<diffusers>"),
    "ltx": ("<own>",),
    "mochi": ("<own>",),
}
ENCODERS: dict[str, dict[str, tuple[str, ...]]] = {
    "sdxl": {
        "clip_l": ("lora_te1_<flat>", "text_encoder.<own>"),
        "clip_g": ("lora_te2_<flat>", "text_encoder_2.<own>"),
    },
    "flux": {
        "clip_l": ("lora_te_<flat>", "lora_te1_<flat>", "text_encoder.<own>", "text_encoders.clip_l.transformer.<own>"),
        "t5xxl": (
            "lora_te2_<flat>",
            "lora_te3_<flat>",
            "text_encoders.t5xxl.transformer.<own>",
            "text_encoders.transformer.<own>",
        ),
    },
    "sd3": {"clip_g": ("lora_te2_<flat>",), "t5xxl": ("lora_te3_<flat>", "text_encoders.t5xxl.transformer.<own>")},
}
CASES = [(network, spelling) for network in SPELLINGS for spelling in (*ALWAYS, *SPELLINGS[network])]
TEXTS = [(network, name, one) for network, names in ENCODERS.items() for name, some in names.items() for one in some]


def _spelt(spelling: str, network: str, name: str) -> str:
    """What a spelling calls the weight `name`, which is the release's, or diffusers' where it has that in it."""
    module = name.removesuffix(".weight")
    own = in_comfyui(network, name).removesuffix(".weight") if "diffusers" not in spelling else module
    processor = module.replace(".to_", ".processor.to_").removesuffix(".0")
    filled = spelling.replace("<flat diffusers>", module.replace(".", "_")).replace("<diffusers>", module)
    filled = filled.replace("<release>", module).replace("<processor>", processor)
    return filled.replace("<flat>", own.replace(".", "_")).replace("<own>", own)


def _pair(stem: str, shape: tuple[int, ...], underscore: bool = False) -> tuple[Arrays, np.ndarray]:
    rng = np.random.default_rng(3)
    down, up = draw(rng, (2, *shape[1:]), np.float32), draw(rng, (shape[0], 2), np.float32)
    leaf = "_lora." if underscore else ".lora_"
    return {f"{stem}{leaf}down.weight": down, f"{stem}{leaf}up.weight": up}, up @ down


def _merged(weights: Weights, tensors: Arrays, folder: Path) -> tuple[Arrays, Arrays]:
    base = written(weights, "ComfyUI", folder)
    save_file(tensors, folder / "lora.safetensors")
    merge(base, folder / "lora.safetensors", output=folder / "out")
    return load_file(base), load_file(folder / "out" / base.name)


def _changed(before: Arrays, after: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, after[name] - value) for name, value in before.items() if not np.array_equal(after[name], value))


@pytest.mark.parametrize(("network", "spelling"), CASES)
def test_a_denoiser_is_found_under_each_of_comfyui_s_names(network: str, spelling: str, tmp_path: Path) -> None:
    weights, tensors = drawn(network, np.float32), tensors_of(network)
    split = "diffusers" in spelling or "processor" in spelling
    spans, wanted = dict(tensors.spans), r"to_k\." if "processor" in spelling else r"\.0\."
    shapes = {n: t.shape for n, t in weights.denoiser.items()} if split else tensors.single
    name = next(n for n, shape in shapes.items() if re.search(wanted, n) and len(shape) == 2 and n.endswith("weight"))
    lora, delta = _pair(_spelt(spelling, network, name), shapes[name], "processor" in spelling)
    ((stored, change),) = _changed(*_merged(weights, lora, tmp_path))
    single, first = (spans[name][0][0], spans[name][0][1]) if split else (name, 0)
    assert stored == KINDS[network].saved + in_comfyui(network, single)
    np.testing.assert_allclose(change[first : first + len(delta)], delta, atol=1e-5)
    assert not np.delete(change, np.s_[first : first + len(delta)], axis=0).any()


@pytest.mark.parametrize(("network", "encoder", "spelling"), TEXTS)
def test_a_text_encoder_is_found_under_each_of_comfyui_s_names(
    network: str, encoder: str, spelling: str, tmp_path: Path
) -> None:
    weights = drawn(network, np.float32)
    name, value = next(iter(weights.encoders[encoder].items()))
    module = name.removesuffix(".weight")
    stem = spelling.replace("<flat>", module.replace(".", "_")).replace("<own>", module)
    lora, delta = _pair(stem, value.shape)
    ((stored, change),) = _changed(*_merged(weights, lora, tmp_path))
    assert f".{encoder}." in stored
    assert stored.endswith(name)
    np.testing.assert_allclose(change, delta, atol=1e-5)


def test_peft_s_names_of_stable_diffusion_3_need_the_scale_that_their_configuration_has(tmp_path: Path) -> None:
    """ComfyUI takes 1 for it."""
    weights = drawn("sd3", np.float32)
    name = next(n for n in weights.denoiser if "attn.to_k.weight" in n)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    factors, _ = _pair(module, weights.denoiser[name].shape)
    lora = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for key, value in factors.items()}
    with pytest.raises(FitError, match=r"without their adapter_config\.json"):
        _merged(weights, lora, tmp_path)


@pytest.mark.parametrize("network", sorted(KINDS))
def test_what_is_written_for_comfyui_has_names_that_it_reads(network: str, tmp_path: Path) -> None:
    weights = drawn(network, np.float32)
    base = written(weights, "ComfyUI", tmp_path)
    save_file(lora_of(weights, "kohya", encoders=True).tensors, tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", "comfyui", output=tmp_path / "comfyui.safetensors", base=base)
    read = {
        f"diffusion_model.{name.removeprefix(KINDS[network].saved)}" if name.startswith(KINDS[network].saved) else name
        for name in load_file(base)
    }
    modules = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "comfyui.safetensors") if ".lora_" in key}
    assert modules
    assert {f"{module}.weight" for module in modules} <= read
