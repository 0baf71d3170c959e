# SPDX-License-Identifier: Apache-2.0
"""A heat map of layers says of all weights which is the worst, whether or not there is room for its cell."""

from __future__ import annotations

import pytest

from surgery.reports.layer_grid import layer_chart, layer_of
from surgery.reports.values import phrase_text


def chart(values: dict[str, float], worst: str = "greatest"):
    found = layer_chart("t", ((name, value, 1.0) for name, value in values.items()), lambda a, b: a / b, worst=worst)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("model.layers.3", "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("model.layers.3", "mlp.experts.*.up_proj")),
        ("lm_head.weight", None),
    ],
)
def test_a_weight_has_its_place(name, place):
    assert layer_of(name) == place


def test_layers_are_called_as_they_are_but_for_what_all_names_begin_with():
    names = [
        "unet.double_blocks.0.img_attn.qkv.weight",
        "unet.double_blocks.1.img_attn.qkv.weight",
        "unet.single_blocks.0.linear1.weight",
    ]
    rows = chart(dict.fromkeys(names, 1.0)).table.rows
    assert [row[0] for row in rows] == ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
    (row,) = chart({f"model.layers.7.{part}.weight": 1.0 for part in ("q", "k")}).table.rows
    assert row[0] == "7"


def test_a_median_of_two_is_between_them():
    assert phrase_text(chart({"layers.0.q.weight": 1.0, "layers.0.k.weight": 2.0}).says).endswith("median 1.5")


@pytest.mark.parametrize(("worst", "where"), [("greatest", "layer 199"), ("least", "layer 198")])
def test_the_worst_is_named_where_its_cell_is_left_out(worst, where):
    values = {f"layers.{n}.q.weight": 5.0 for n in range(200)} | {
        "layers.199.q.weight": 9.0,
        "layers.198.q.weight": 1.0,
    }
    found = chart(values, worst)
    assert len(found.table.rows) == 160
    assert where in phrase_text(found.says)
    assert "160 of 200 layers and 1 of 1 part are shown" in phrase_text(found.says)
