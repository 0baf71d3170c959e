# SPDX-License-Identifier: Apache-2.0
"""Layouts of diffusion networks against diffusers' own conversion of single files: names, rows, and whole merges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import merge
from surgery_formats.models.layouts.index import LayoutIndex, Rows
from surgery_formats.models.layouts.registry import NETWORKS, indexes_of
from tests.support.adapter_files import GOLDEN, Arrays

MODELS: dict[str, Any] = json.loads((GOLDEN / "layouts/rows.json").read_text())["models"]
Span = list[Any]
WIDTH = 4


def _spans(entry: str | list[Span], heights: dict[str, int]) -> list[Span]:
    return [[entry, 0, heights[entry]]] if isinstance(entry, str) else entry


def _span(rows: Rows, heights: dict[str, int]) -> Span:
    height = heights[rows.name]
    assert height * rows.start % rows.parts == height * rows.stop % rows.parts == 0
    return [rows.name, height * rows.start // rows.parts, height * rows.stop // rows.parts]


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_a_base_tell_its_family_in_either_layout(name: str) -> None:
    """LTX-2 has all that LTX-Video has; no other family has all of another's."""
    model = MODELS[name]
    for names in (list(model["heights"]), list(model["rows"])):
        found = indexes_of(names, {})
        wanted = ["LTX-Video", "LTX-2"] if name == "ltx" else [model["family"]]
        assert [index.network.name for index in found] == wanted
        assert {index.known for index in found} == {len(names)}


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_that_diffusers_takes(name: str) -> None:
    """A single file under diffusers' names, and diffusers' parameters under those of a single file."""
    model = MODELS[name]
    heights: dict[str, int] = model["heights"]
    ours = {n: sum(b - a for _, a, b in _spans(entry, heights)) for n, entry in model["rows"].items()}
    for single, split in zip(indexes_of(list(heights), {}), indexes_of(list(ours), {}), strict=True):
        wanted: dict[str, list[tuple[int, int, str, int]]] = {}
        for parameter, entry in model["rows"].items():
            spans, row = _spans(entry, heights), 0
            found = [Rows(parameter)] if parameter in heights else single.rows(parameter)
            assert [_span(rows, heights) for rows in found] == spans
            for tensor, start, stop in spans:
                wanted.setdefault(tensor, []).append((start, stop, parameter, row))
                row += stop - start
        for tensor, pieces in wanted.items():
            found = [Rows(tensor)] if tensor in ours else split.rows(tensor)
            flattened = [[p, row, row + stop - start] for start, stop, p, row in sorted(pieces)]
            assert [_span(rows, ours) for rows in found] == flattened


def _small(model: Any) -> tuple[dict[str, int], dict[str, list[Span]]]:
    """Heights and spans, divided by what divides all of them."""
    heights: dict[str, int] = model["heights"]
    spans = {name: _spans(entry, heights) for name, entry in model["rows"].items()}
    unit = math.gcd(*heights.values(), *(edge for some in spans.values() for _, *edges in some for edge in edges))
    heights = {name: rows // unit for name, rows in heights.items()}
    return heights, {n: [[t, a // unit, b // unit] for t, a, b in some] for n, some in spans.items()}


def _converted(single: Arrays, spans: dict[str, list[Span]]) -> Arrays:
    """What diffusers makes of a single file."""
    return {name: np.concatenate([single[t][a:b] for t, a, b in some]) for name, some in spans.items()}


def _adapter(heights: dict[str, int], rng: np.random.Generator, prefix: str, *, flat: bool) -> Arrays:
    leaves = ("lora_down.weight", "lora_up.weight") if flat else ("lora_A.weight", "lora_B.weight")
    found: Arrays = {}
    for name, rows in heights.items():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            stem = prefix + (module.replace(".", "_") if flat else module)
            found[f"{stem}.{leaves[0]}"] = rng.standard_normal((2, WIDTH)).astype(np.float32)
            found[f"{stem}.{leaves[1]}"] = rng.standard_normal((rows, 2)).astype(np.float32)
    return found


@pytest.mark.parametrize("spelling", ["single", "diffusers"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "openclip"])
def test_a_merge_into_either_layout_is_the_same_model(name: str, spelling: str, tmp_path: Path) -> None:
    """Merged and then converted by diffusers is converted and then merged; an adapter may be of either spelling."""
    model = MODELS[name]
    heights, spans = _small(model)
    rng = np.random.default_rng(3)
    single = {n: rng.standard_normal((rows, WIDTH)).astype(np.float32) for n, rows in heights.items()}
    split = _converted(single, spans)
    prefix = "model.diffusion_model."
    save_file({prefix + n: tensor for n, tensor in single.items()}, tmp_path / "single.safetensors")
    (tmp_path / "split").mkdir()
    save_file(split, tmp_path / "split" / "diffusion_pytorch_model.safetensors")
    network = next(network for network in NETWORKS if network.name == model["family"])
    (tmp_path / "split" / "config.json").write_text(json.dumps({"_class_name": network.classes[0]}))
    sizes = heights if spelling == "single" else {n: len(tensor) for n, tensor in split.items()}
    start = "lora_unet_" if spelling == "single" else "transformer."
    save_file(_adapter(sizes, rng, start, flat=spelling == "single"), tmp_path / "lora.safetensors")
    merge(tmp_path / "single.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "a")
    merge(tmp_path / "split", tmp_path / "lora.safetensors", output=tmp_path / "b")
    one = load_file(tmp_path / "a" / "single.safetensors")
    other = load_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    assert list(one) == [prefix + n for n in single] or one.keys() == {prefix + n for n in single}
    converted = _converted({n.removeprefix(prefix): tensor for n, tensor in one.items()}, spans)
    assert converted.keys() == other.keys() == split.keys()
    assert all(np.array_equal(converted[n], tensor) for n, tensor in other.items())
    changed = {n for n, tensor in other.items() if not np.array_equal(tensor, split[n])}
    assert changed >= {n for n in split if n.endswith(".weight") and (spelling == "diffusers" or n in single)}
    assert changed


def test_hunyuan_video_has_the_same_rows_under_comfyuis_names() -> None:
    """ComfyUI renames the release as it loads it; its own files hold the new names."""
    heights = MODELS["hunyuan-video"]["heights"]
    renamed = {_in_comfyui(name): name for name in heights}
    (release,), (comfyui,) = indexes_of(list(heights), {}), indexes_of(list(renamed), {})
    assert comfyui.known == len(heights)
    for parameter in MODELS["hunyuan-video"]["rows"]:
        rows = comfyui.rows(parameter)
        assert [(renamed[r.name], r.start, r.stop, r.parts) for r in rows] == [
            (r.name, r.start, r.stop, r.parts) for r in release.rows(parameter)
        ]
    assert all(comfyui.rows(name) == (Rows(new),) for new, name in renamed.items() if new != name)


def _in_comfyui(name: str) -> str:
    for old, new in (
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."),
        ("_attn_qkv.", "_attn.qkv."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
        ("_attn_proj.", "_attn.proj."),
        (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
    ):
        name = name.replace(old, new)
    return name


def test_a_base_of_no_family_has_no_other_names() -> None:
    assert indexes_of(["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"], {}) == ()
    assert indexes_of(list(MODELS["flux"]["rows"]), {"model_type": "llama"}) == ()
    assert LayoutIndex.of(NETWORKS[0], []).rows("input_blocks.0.0.weight") == ()
