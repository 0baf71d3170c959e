# SPDX-License-Identifier: Apache-2.0
"""The base installation: whole processes from which every package of an extra is hidden, as if it had not been installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from surgery_formats.errors import MissingPackageError
from surgery_formats.extras import EXTRAS, explained, missing_package, require
from tests.support.kit import ROOT, environment, spawn

BASE, TUNED, LORA, PROMPT = (f"{ROOT}/examples/{name}" for name in ("base", "tuned", "lora", "prompt"))

HIDING = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Hidden())
"""

NEEDS_NOTHING = {
    "formats": ["formats"],
    "env": ["env"],
    "inspect": ["inspect", LORA],
    "report": ["report", LORA, "--base", BASE],
    "merge": ["merge", BASE, LORA, "-o", "{out}"],
    "merge to float16": ["merge", BASE, LORA, "--dtype", "fp16", "-o", "{out}"],
    "extract": ["extract-lora", BASE, TUNED, "--rank", "4", "-o", "{out}"],
    "convert": ["convert", LORA, "--to", "mlx", "-o", "{out}"],
    "combine": ["combine", f"{LORA}=0.5", f"{LORA}=-1", "-o", "{out}"],
    "resize": ["resize", LORA, "--rank", "4", "-o", "{out}"],
    "layers": ["layers", BASE, "--keep", "0,2-3", "-o", "{out}"],
    "insert": ["insert", BASE, "--new", "lora", "-o", "{out}"],
    "diff": ["diff", BASE, TUNED],
    "fingerprint": ["fingerprint", BASE],
    "check": ["check", BASE, LORA],
    "prompt show": ["prompt", "show", PROMPT, "--base", BASE],
    "prompt bake": ["prompt", "bake", PROMPT, BASE, "-o", "{out}"],
}

NEEDS = {
    "onnx": ["export-onnx", BASE, "-o", "{out}"],
    "onnxruntime": ["run", "{graph}", "--ids", "5,6,7"],
    "torch": ["verify", "{graph}"],
    "tokenizers": ["run", "{graph}", "-p", "function"],
    "huggingface_hub": ["inspect", "hf://org/name"],
    "obstore": ["inspect", "s3://bucket/model"],
}


def hidden(folder: Path, *names: str) -> dict[str, str]:
    """The environment of a process to which these packages are not installed."""
    (folder / "sitecustomize.py").write_text(HIDING.format(names=set(names)))
    return {"PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]])}


@pytest.fixture(scope="module")
def base_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hidden(tmp_path_factory.mktemp("site"), *EXTRAS)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graph") / "out"
    assert spawn("export-onnx", BASE, "-o", out).returncode == 0
    return out


@pytest.mark.parametrize("name", NEEDS_NOTHING)
def test_the_base_installation_does_all_but_graphs(name: str, base_only: dict[str, str], tmp_path: Path) -> None:
    done = spawn(*(word.format(out=tmp_path / "out") for word in NEEDS_NOTHING[name]), **base_only)
    assert done.returncode == 0, done.stderr


def test_a_merge_is_verified_and_taken_back_by_the_base_installation(base_only: dict[str, str], tmp_path: Path) -> None:
    assert spawn("merge", BASE, LORA, "--reversible", "-o", tmp_path / "out", **base_only).returncode == 0
    assert spawn("verify", tmp_path / "out", "--against", BASE, "--adapter", LORA, **base_only).returncode == 0
    assert spawn("unmerge", tmp_path / "out", LORA, "-o", tmp_path / "back", **base_only).returncode == 0


@pytest.mark.parametrize("package", NEEDS)
@pytest.mark.parametrize("only", [True, False], ids=["it alone", "every extra"])
def test_what_is_missing_is_one_message_with_the_line_that_installs_it(
    package: str, only: bool, graph: Path, base_only: dict[str, str], tmp_path: Path
) -> None:
    here = hidden(tmp_path, package) if only else base_only
    words = [word.format(out=tmp_path / "out", graph=graph) for word in NEEDS[package]]
    done = spawn(*words, **here)
    assert done.returncode == 2, done.stderr
    message, hint = done.stderr.splitlines()
    named = re.fullmatch(r"error: .*needs? the package (\w+), which is not installed", message)
    assert named is not None, message
    assert named[1] == package or not only
    assert f"pip install 'model-surgery[{EXTRAS[named[1]]}]'" in hint
    assert not (tmp_path / "out").exists()
    told = json.loads(spawn(*words, "--json", **here).stderr)["error"]
    assert told["code"] == "MissingPackageError"


def test_the_library_raises_it_too(base_only: dict[str, str]) -> None:
    code = (
        "import surgery\n"
        "try:\n"
        f"    surgery.export_onnx({BASE!r}, output='never')\n"
        "except surgery.MissingPackageError as error:\n"
        "    assert isinstance(error, ImportError)\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**base_only), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        "this needs the package onnx, which is not installed; pip install 'model-surgery[onnx]'"
    )


def test_every_extra_and_its_package_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(re.match(rf"{package}\b", requirement) for requirement in extras[extra]), package
    assert {"all", "cuda", "demo", "dev", "docs", *EXTRAS.values()} == set(extras)
    named = re.fullmatch(r"model-surgery\[(.*)\]", extras["all"][0])
    assert named is not None
    assert set(named[1].split(",")) == set(EXTRAS.values()) - {"ray"}  # 236 MB


def test_a_package_that_lacks_something_itself_is_no_missing_extra() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'onnx.made_up'", name="onnx.made_up")) is None
    assert missing_package(ModuleNotFoundError("No module named 'numpy'", name="numpy")) is None

    @explained
    def fails() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    with pytest.raises(MissingPackageError, match="torch"):
        fails()


def test_what_is_installed_is_given() -> None:
    import tokenizers

    assert require("tokenizers", "texts") is tokenizers
