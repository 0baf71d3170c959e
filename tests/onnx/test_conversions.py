# SPDX-License-Identifier: Apache-2.0
"""Weights stored in another type than they are computed in: converted where they are used, they do the same and are not held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from surgery.onnx.run.conversions import converted_nbytes, with_late_conversions
from surgery.onnx.run.ports import cpu_session

ROOT = Path(__file__).parents[2]
SIZE, COUNT = 1024, 24


def chain(folder: Path, size: int, count: int) -> onnx.ModelProto:
    """``x W0 W1 ...`` of float16 weights in a file; all are converted in front, and the last is read in a branch."""
    chance = np.random.default_rng(0)
    model = onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", 21)])
    model.graph.name = "chain"
    with open(folder / "weights", "wb") as file:
        for number in range(count):
            weight = model.graph.initializer.add(name=f"w{number}", data_type=TensorProto.FLOAT16, dims=[size, size])
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", file.tell()), ("length", 2 * size * size)):
                weight.external_data.add(key=key, value=str(value))
            file.write((chance.standard_normal((size, size)) / size**0.5).astype(np.float16).tobytes())
    for number in range(count):
        model.graph.node.append(helper.make_node("Cast", [f"w{number}"], [f"c{number}"], to=TensorProto.FLOAT))
    for number in range(count - 1):
        model.graph.node.append(helper.make_node("MatMul", [f"v{number}", f"c{number}"], [f"v{number + 1}"]))
    last = count - 1
    inner = helper.make_node("MatMul", [f"v{last}", f"c{last}"], ["inner"])
    port = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([inner], "branch", [], [port])
    model.graph.node.append(helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch))
    model.graph.input.append(helper.make_tensor_value_info("v0", TensorProto.FLOAT, [1, size]))
    model.graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    return model


def test_a_weight_is_converted_in_front_of_its_first_reader(tmp_path: Path) -> None:
    model = chain(tmp_path, 4, 3)
    before = model.SerializeToString()
    late = with_late_conversions(model)
    assert model.SerializeToString() == before
    assert [node.output[0] for node in late.graph.node] == ["c0", "v1", "c1", "v2", "c2", "y"]
    assert converted_nbytes(model) == converted_nbytes(late) == 3 * 4 * 4 * 4


def test_the_results_are_the_same(tmp_path: Path) -> None:
    model = chain(tmp_path, 64, 5)
    feed = {"v0": np.random.default_rng(1).standard_normal((1, 64), np.float32), "yes": np.array(True)}
    once, late = (cpu_session(model, tmp_path, held=held).run(None, feed)[0] for held in (1 << 40, 0))
    assert np.isfinite(once).all()
    assert abs(once).max() > 0.1
    assert np.array_equal(once, late)


RUN = """
import sys
from pathlib import Path
import numpy as np
import onnx
from surgery.onnx.run.ports import cpu_session
folder, held, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
session = cpu_session(onnx.load(folder / "model.onnx", load_external_data=False), folder, held=held)
for _ in range(2):
    session.run(None, {"v0": np.ones((1, size), np.float32), "yes": np.array(True)})
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_what_is_converted_late_is_not_held(tmp_path: Path) -> None:
    onnx.save(chain(tmp_path, SIZE, COUNT), tmp_path / "model.onnx")
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "formats", "cli"))
    once, late = (
        int(
            subprocess.check_output(
                [sys.executable, "-c", RUN, str(tmp_path), str(held), str(SIZE)],
                env={**os.environ, "PYTHONPATH": paths},
            )
        )
        for held in (1 << 40, 0)
    )
    assert once - late > 0.8 * 4 * SIZE * SIZE * COUNT
