# SPDX-License-Identifier: Apache-2.0
"""A merge in processes has the bytes of a merge in threads, and fails as it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.kit import environment, make_base, make_lora

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux only")

# Torch is imported here, so that nothing is forked: each merge is a process of its own.
MERGE = """
import json, os, signal, sys
import surgery
from surgery.engine import arithmetic, execute, jobs, processes
execute._WORTH_IT = 1
base, lora, out, workers, fault = sys.argv[1:]
parent, computed = os.getpid(), arithmetic.compute
forks, seen = [], []
execute.forked = lambda count, work: forks.append(count) or processes.forked(count, work)

def compute(*args, **named):
    if os.getpid() != parent and fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return computed(*args, **named)

def cut(self, memory, offset, real=jobs.OutputFile.pwrite):
    if os.getpid() == parent or fault != "cut":
        real(self, memory, offset)
    else:
        real(self, memory[: len(memory) // 2], offset)

arithmetic.compute, jobs.OutputFile.pwrite = compute, cut
try:
    surgery.merge(base, lora, output=out, workers=int(workers), progress=lambda step: seen.append(step.done / step.total))
except surgery.SurgeryError as error:
    print(json.dumps([forks, type(error).__name__, str(error)]))
else:
    assert seen == sorted(seen) and seen[-1] == 1, seen
    print(json.dumps([forks, "", ""]))
"""


def merge(base: Path, lora: Path, out: Path, workers: int, fault: str = "") -> tuple[list[int], str, str]:
    command = [sys.executable, "-c", MERGE, str(base), str(lora), str(out), str(workers), fault]
    environ = environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environ, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    forks, error, text = json.loads(done.stdout)
    return forks, error, text


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return make_base(tmp_path / "base"), make_lora(tmp_path / "lora")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_processes_write_the_bytes_of_threads(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert merge(*inputs, tmp_path / "threads", 2) == ([], "", "")
    assert merge(*inputs, tmp_path / "processes", 5) == ([5], "", "")
    assert contents(tmp_path / "threads") == contents(tmp_path / "processes")


def test_an_error_in_a_process_is_the_same_error(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = inputs
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    _, error, text = merge(base, lora, tmp_path / "out", 1)
    assert (error, name in text) == ("FitError", True)
    assert merge(base, lora, tmp_path / "out", 5) == ([5], error, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"], "nothing is left behind"


@pytest.mark.parametrize(("fault", "error"), [("killed", "ResourceError"), ("cut", "ProofError")])
def test_a_process_that_fails_leaves_nothing(inputs: tuple[Path, Path], tmp_path: Path, fault: str, error: str) -> None:
    forks, found, text = merge(*inputs, tmp_path / "out", 5, fault)
    assert (forks, found) == ([5], error), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"], "nothing is left behind"
