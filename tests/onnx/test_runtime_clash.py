# SPDX-License-Identifier: Apache-2.0
"""onnxruntime and onnxruntime-gpu in one environment: whole processes over what is left of two packages that share files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kit import ROOT, environment, spawn

BASE, LORA = f"{ROOT}/examples/base", f"{ROOT}/examples/lora"
REMAINS = {
    # Of `pip uninstall onnxruntime` beside onnxruntime-gpu 1.31.1: a module without anything in it.
    "nothing left": "",
    # Files of two versions: what one imports the other does not have.
    "a name missing": "raise ImportError('cannot import name OrtValue from onnxruntime.capi')",
    "a library missing": "raise OSError('libonnxruntime.so: undefined symbol: OrtGetApiBase')",
}


@pytest.fixture(params=REMAINS)
def clash(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(REMAINS[request.param])
    for name in ("onnxruntime", "onnxruntime_gpu"):
        info = tmp_path / f"{name}-9.9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9.9\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graph") / "out"
    assert spawn("export-onnx", BASE, "-o", out).returncode == 0
    return out


@pytest.mark.parametrize("command", ["run", "bench", "verify"])
def test_the_cure_is_told(command: str, clash: dict[str, str], graph: Path) -> None:
    words = ["--ids", "5,6,7"] if command == "run" else []
    done = spawn(command, graph, *words, **clash)
    assert done.returncode == 2, done.stderr
    message, hint = done.stderr.splitlines()
    assert message.startswith("error: onnxruntime cannot be imported: ")
    assert "onnxruntime-gpu and onnxruntime are both installed" in message
    assert hint == "  hint: pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime-gpu"


def test_a_merge_needs_none_of_it(clash: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import surgery, surgery_formats.fast_casts as casts\n"
        "assert casts.casts_like_numpys() == {}\n"
        f"surgery.merge({BASE!r}, {LORA!r}, dtype='fp16', output={str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(**clash), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
