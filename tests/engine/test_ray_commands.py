# SPDX-License-Identifier: Apache-2.0
"""Extractions, exports of codes and conversions on a real Ray cluster, a node killed on the way, have the bytes of one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.algebra.test_lora_form import trained
from tests.oracles import recipes
from tests.support.extractions import everything, only, tune
from tests.support.held_request import HOLD, HeldOnRay

pytest.importorskip("ray")
from tests.engine.test_ray import Nodes, contents, meanwhile, nodes, noted, until  # noqa: F401 - a fixture

Command = Callable[[Path, Any], Any]


def extraction(folder: Path) -> Command:
    base = recipes.build("llama", folder / "base", num_hidden_layers=3)
    tuned = tune(base, folder / "tuned", only("_proj", everything))
    return lambda output, engine: surgery.extract_lora(base, tuned, output=output, rank=4, engine=engine)


def export(folder: Path) -> Command:
    base = recipes.build("llama", folder / "base", hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    return lambda output, engine: surgery.export_onnx(base, output=output, weights_type="int4", engine=engine)


def conversion(folder: Path) -> Command:
    _, base, adapter = trained("oft", folder / "oft")
    return lambda output, engine: surgery.convert(
        adapter, "peft", output=output, base=base, as_lora=True, rank=3, engine=engine
    )


@pytest.mark.parametrize("made", [extraction, export, conversion], ids=lambda made: made.__name__)
def test_a_node_that_is_killed_loses_nothing(
    made: Callable[[Path], Command],
    nodes: Nodes,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = made(tmp_path)
    (notes := tmp_path / "notes").mkdir()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    command(tmp_path / "here" / "out", None)
    nodes.grow(2)
    doomed = nodes.add()
    killed: list[int] = []

    def kill() -> None:
        until(lambda: len({node for _, node in noted(notes)}) > 1 and any(n == doomed.node_id for _, n in noted(notes)))
        killed.extend(index for index, node in noted(notes) if node == doomed.node_id)
        nodes.kill(doomed)

    with meanwhile(kill, notes / f"{HOLD}0"):
        command(tmp_path / "there" / "out", HeldOnRay(nodes.address, notes))
    assert contents(tmp_path / "there" / "out") == contents(tmp_path / "here" / "out")
    begun = Counter(index for index, _ in noted(notes))
    assert killed
    assert all(begun[index] == 2 for index in killed)
    assert list((tmp_path / "there").glob(".*")) == []


@pytest.mark.parametrize("made", [extraction, export, conversion], ids=lambda made: made.__name__)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_nodes_gives_the_same_bytes(
    made: Callable[[Path], Command],
    count: int,
    nodes: Nodes,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = made(tmp_path)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    nodes.grow(count)
    command(tmp_path / "here" / "out", None)
    command(tmp_path / "there" / "out", nodes.engine)
    assert contents(tmp_path / "there" / "out") == contents(tmp_path / "here" / "out")
