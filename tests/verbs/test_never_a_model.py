# SPDX-License-Identifier: Apache-2.0
"""A file that holds factors alone is a model to no command, and what no command reads is named by all in the same words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click import Context
from click.testing import CliRunner
from safetensors.numpy import save_file

import surgery
from surgery_cli.group import surgery as command
from surgery_formats import open_checkpoint
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.models.known_files import KNOWN_FILES, known_file
from tests.support.adapter_files import GOLDEN, draw

_ENDINGS = (".safetensors", ".bin", ".pt", ".lora", ".gguf", ".onnx_adapter", ".npy", ".npz", ".nemo", ".h5")
_OTHERS = ("base", "expected")
_NO_ADAPTERS = ("expected", "logits", "answers", "model_head")
GRAPH = os.fspath(GOLDEN / "onnx_graphs" / "genai-llama" / "model.onnx")
PROMPT = "examples/prompt"
LORA, BASE = "examples/lora", "examples/base"


def _golden() -> list[str]:
    """Every golden file of an adapter, and every folder with one that has a configuration; no base, and no expected weights."""
    files = [
        path
        for path in sorted(GOLDEN.rglob("*"))
        if path.name.endswith(_ENDINGS)
        and not any(part.startswith(_OTHERS) for part in path.relative_to(GOLDEN).parts)
        and not any(word in path.name for word in _NO_ADAPTERS)
        and path.name != "model.safetensors"
        and path.parts[-2] != "full"  # of MLX: weights in full, which nothing but their folder tells from a model's
    ]
    folders = {path.parent for path in files if any(path.parent.glob("*.json")) or any(path.parent.glob("*.yaml"))}
    models = ("model.safetensors", "model.onnx")
    folders = {
        folder for folder in folders if folder != GOLDEN and not any((folder / name).exists() for name in models)
    }
    return [os.fspath(path.relative_to(GOLDEN)) for path in [*files, *sorted(folders)]]


def _in_the_place_of_a_model(path: str, out: str) -> Mapping[str, list[str]]:
    return {
        "merge": [path, LORA, "-o", out],
        "merge twice": [path, path, "-o", out],
        "extract-lora, base": [path, BASE, "--rank", "2", "-o", out],
        "extract-lora, tuned": [BASE, path, "--rank", "2", "-o", out],
        "diff": [BASE, path],
        "layers": [path, "--keep", "0", "-o", out],
        "unmerge": [path, LORA, "-o", out],
        "check": [path, LORA, "--for", "vllm"],
        "convert": [LORA, "--to", "kohya", "--base", path, "-o", out],
        "combine": [LORA, LORA, "--base", path, "--rank", "2", "-o", out],
        "resize": [LORA, "--base", path, "--rank", "1", "-o", out],
        "report": [LORA, "--base", path],
        "export-onnx": [path, "-o", out],
        "verify": [path],
        "eval": [path, "--text", "README.md"],
        "insert": [path, LORA, "-o", out],
        "insert, new": [path, "--new", "lora", "-o", out],
        "locate": [path, "--base", BASE],
        "locate, base": [GRAPH, "--base", path],
        "fold": [path, "-o", out],
        "strip": [path, "-o", out],
        "prompt nearest": [PROMPT, path],
        "prompt bake": [PROMPT, path, "--as", "tokens", "-o", out],
        "run": [path, "--prompt", "x"],
        "bench": [path],
    }


_OF_GRAPHS = ("verify", "run", "bench", "locate", "fold", "strip")  # which say that it is no graph
_WITHOUT_A_MODEL = {
    "inspect",
    "env",
    "formats",
    "completion",
    "apply",
    "fingerprint",
}  # `inspect` is tried by `surgery.open`, which it calls; `fingerprint` takes any weights for what they are


def test_every_command_that_takes_a_model_is_tried() -> None:
    tried = {place.partition(",")[0].split()[0] for place in _in_the_place_of_a_model("", "")}
    assert tried | _WITHOUT_A_MODEL == {*command.list_commands(Context(command))}


@pytest.mark.parametrize("name", _golden())
def test_no_command_takes_it_for_a_model(name: str, tmp_path: Path) -> None:
    path, out = os.fspath(GOLDEN / name), os.fspath(tmp_path / "out")
    for place, arguments in _in_the_place_of_a_model(path, out).items():
        done = CliRunner().invoke(command, [*place.partition(",")[0].removesuffix(" twice").split(), *arguments])
        assert done.exit_code in (2, 3, 4), (place, done.output)
        assert "internal" not in done.output, place
        assert not (tmp_path / "out").exists(), place
    try:
        opened = surgery.open(path)
    except SurgeryError:
        return
    assert isinstance(opened, Adapter)


def _known() -> dict[str, tuple[str, dict[str, Any]]]:
    """``name -> (what is said, tensors)``; names as the programs write them."""
    one = draw(1, 4, 8)
    ip = {"image_proj.proj.weight": one, "ip_adapter.1.to_k_ip.weight": one}
    return {
        "ip-adapter": ("an IP-Adapter", ip),
        "ip-adapter of XLabs": (
            "an IP-Adapter",
            {"ip_adapter_proj_model.proj.weight": one, "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": one},
        ),
        "faceid": ("an IP-Adapter", {**ip, "ip_adapter.0.to_q_lora.down.weight": one}),
        "pulid": ("PuLID", {"pulid_encoder.body.0.weight": one, "pulid_ca.0.to_q.weight": one}),
        "control-lora": (
            "a Control-LoRA",
            {
                "lora_controlnet": draw(1, 1),
                "input_blocks.1.0.in_layers.2.up": one,
                "input_blocks.1.0.in_layers.2.down": one,
                "input_blocks.0.0.bias": draw(1, 4),
                "input_hint_block.0.weight": one,
                "zero_convs.0.0.weight": one,
            },
        ),
        "layerdiffuse": ("factors of layerdiffuse", {"diffusion_model.x.weight::lora::0": one, "diffusion_model.y.weight::diff::0": one}),
        "lllite": ("ControlNet-LLLite", {"lllite_unet_input_blocks_4_1.down.0.weight": one}),
        "t-lora": (
            "T-LoRA",
            {
                "lora_unet_a.q_layer.weight": one,
                "lora_unet_a.p_layer.weight": one,
                "lora_unet_a.lambda_layer": one,
                "lora_unet_a.alpha": draw(1, 1),
            },
        ),
        "nunchaku": (
            "Nunchaku",
            {"transformer_blocks.0.mlp_fc1.lora_down": one, "transformer_blocks.0.mlp_fc1.lora_up": one},
        ),
        "weights of AdapterHub": ("weights of AdapterHub", {"layer.0.output.adapters.x.adapter_down.0.bias": one}),
        "old weights of AdapterHub": ("weights of AdapterHub", {"layer.0.attention_text_task_adapters.x.up.bias": one}),
        "LoRA of AdapterHub": ("weights of AdapterHub", {"layer.0.query.loras.x.vera_B": one}),
        "prefix of AdapterHub": ("weights of AdapterHub", {"prefix_tuning.prefix_tunings.x.self_prefix.control_trans": one}),
        "ReFT of AdapterHub": ("weights of AdapterHub", {"layer.0.reft_layer.refts.x.units.0.projection.weight": one}),
        "fusion of AdapterHub": ("AdapterHub's fusion", {"layer.0.output.adapter_fusion_layer.a,b.query.weight": one}),
        "head of AdapterHub": ("a prediction head", {"heads.x.1.weight": one}),
        "prompt": ("a soft prompt", {"prompt_embeddings": draw(1, 5, 768)}),
        "controlnet": ("a ControlNet", {"control_model.input_hint_block.0.weight": one, "control_model.zero_convs.0.0.weight": one}),
        "controlnet of diffusers": ("a ControlNet", {"controlnet_cond_embedding.conv_in.weight": one, "conv_in.weight": one}),
        "t2i-adapter": ("a T2I-Adapter", {"body.0.block1.weight": one, "conv_in.weight": one}),
        "motion module": ("a motion module", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": one}),
    }  # fmt: skip


KNOWN = _known()


def test_every_family_of_the_table_has_a_case() -> None:
    tried = {known_file(tensors.keys()) for _, tensors in KNOWN.values()}
    assert tried | {known for known in KNOWN_FILES if known.what.startswith("a hypernetwork")} == set(KNOWN_FILES)


@pytest.mark.parametrize("name", KNOWN)
def test_what_it_is_and_what_to_do_is_said_where_an_adapter_is_wanted(name: str, tmp_path: Path) -> None:
    what, tensors = KNOWN[name]
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    with pytest.raises(FitError, match=f"^[^:]*: {what}|{what}") as caught:
        read_adapter(file)
    assert caught.value.hint
    network = known_file(tensors.keys())
    assert network is not None
    for arguments in (
        ["merge", BASE, os.fspath(file), "-o", "x"],
        ["convert", os.fspath(file), "--to", "peft", "-o", "x"],
    ):
        done = CliRunner().invoke(command, arguments)
        assert (done.exit_code, done.output.count("\n")) == (4, 2), done.output
        assert what in done.output
    if network.network:  # shown as what it is: weights in full
        assert any(what in note for note in surgery.inspect(file).notes)
        folder = tmp_path / "folder"  # as diffusers saves it
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        for network_at in (file, folder):
            with pytest.raises(FitError, match=what):
                read_adapter(network_at)
            with pytest.raises(FitError, match=what):
                surgery.report([network_at], base=BASE)
        return
    for look in (surgery.open, open_checkpoint):
        with pytest.raises(FitError, match=what):
            look(file)
    for place, arguments in _in_the_place_of_a_model(os.fspath(file), os.fspath(tmp_path / "out")).items():
        done = CliRunner().invoke(command, [*place.partition(",")[0].removesuffix(" twice").split(), *arguments])
        assert done.exit_code in (2, 3, 4), (place, done.output)
        assert what in done.output or place in _OF_GRAPHS, (place, done.output)


def test_torch_files_that_nest_their_tensors_are_named(tmp_path: Path) -> None:
    half = {"linear.0.weight": torch.ones(4, 2), "linear.0.bias": torch.ones(4)}
    torch.save({"step": 9, "name": "x", 768: (half, half), 1280: (half, half)}, tmp_path / "hyper.pt")
    torch.save(
        {"image_proj": {"proj.weight": torch.ones(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2)}},
        tmp_path / "ip.bin",
    )
    for file, what in (("hyper.pt", "a hypernetwork"), ("ip.bin", "an IP-Adapter")):
        for look in (read_adapter, surgery.open, open_checkpoint):
            with pytest.raises(FitError, match=what):
                look(tmp_path / file)


def test_a_folder_of_adapter_fusion_is_named(tmp_path: Path) -> None:
    tensors = {"bert.encoder.layer.0.output.adapter_fusion_layer.a,b.query.weight": torch.ones(4, 4)}
    torch.save(tensors, tmp_path / "pytorch_model_adapter_fusion.bin")
    (tmp_path / "adapter_fusion_config.json").write_text('{"config": {}, "name": "a,b"}')
    for look in (read_adapter, surgery.open, open_checkpoint):
        with pytest.raises(FitError, match="AdapterHub's fusion"):
            look(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["unet.attn2.processor.to_k_ip.0.weight", "conv_in.weight"],  # a network that has an IP-Adapter inside
        ["transformer_blocks.0.mlp_fc1.lora_down", "transformer_blocks.0.mlp_fc1.lora_up", "transformer_blocks.0.mlp_fc1.qweight"],
        ["model.layers.0.self_attn.q_proj.weight", "body.0.weight"],
        ["control_model.zero_convs.0.weight", "control_model.input_hint_block.0.weight", "model.diffusion_model.x.weight"],
        ["controlnet_blocks.0.lora_A.weight", "controlnet_blocks.0.lora_B.weight"],
        ["down_blocks.0.motion_modules.0.x.processor.to_q_lora.down.weight"],
        [],
    ],
)  # fmt: skip
def test_models_and_loras_that_look_alike_are_none(names: list[str]) -> None:
    assert known_file(names) is None


def test_a_model_that_names_a_row_of_its_own_is_read(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert surgery.inspect(tmp_path / "model.safetensors").parameters == 4
