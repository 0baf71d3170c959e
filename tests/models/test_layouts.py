# SPDX-License-Identifier: Apache-2.0
"""Layouts of diffusion networks against diffusers' own conversion of single files: names and rows."""

from __future__ import annotations

from typing import Any

import pytest

from surgery_formats.models.layouts.index import LayoutIndex, Rows
from surgery_formats.models.layouts.registry import NETWORKS, indexes_of
from tests.support.bases import MODELS, in_comfyui

Span = list[Any]


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


def test_hunyuan_video_has_the_same_rows_under_comfyuis_names() -> None:
    """ComfyUI renames the release as it loads it; its own files hold the new names."""
    heights = MODELS["hunyuan-video"]["heights"]
    renamed = {in_comfyui("hunyuan-video", name): name for name in heights}
    (release,), (comfyui,) = indexes_of(list(heights), {}), indexes_of(list(renamed), {})
    assert comfyui.known == len(heights)
    for parameter in MODELS["hunyuan-video"]["rows"]:
        rows = comfyui.rows(parameter)
        assert [(renamed[r.name], r.start, r.stop, r.parts) for r in rows] == [
            (r.name, r.start, r.stop, r.parts) for r in release.rows(parameter)
        ]
    assert all(comfyui.rows(name) == (Rows(new),) for new, name in renamed.items() if new != name)


def test_a_base_of_no_family_has_no_other_names() -> None:
    assert indexes_of(["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"], {}) == ()
    assert indexes_of(list(MODELS["flux"]["rows"]), {"model_type": "llama"}) == ()
    assert LayoutIndex.of(NETWORKS[0], []).rows("input_blocks.0.0.weight") == ()
