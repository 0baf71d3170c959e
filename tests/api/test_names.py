# SPDX-License-Identifier: Apache-2.0
"""What ``import surgery`` offers: every public name, listed, quick to import, and known to type checkers."""

from __future__ import annotations

import ast
import inspect
import json
import rlcompleter
import subprocess
import sys
from types import ModuleType

import pytest

import surgery
import surgery_formats
from surgery_formats import errors
from tests.support.kit import ROOT, environment

HEAVY = ("torch", "numpy", "onnx", "onnxruntime")
PACKAGES = (surgery, surgery_formats)


def python(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, check=True)
    return done.stdout


def type_checked_names(package: ModuleType) -> dict[str, str]:
    """Name -> module of what a package imports for type checkers alone."""
    tree = ast.parse(inspect.getsource(package))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # else it is not exported
    return {alias.name: node.module or "" for node in imports for alias in node.names}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda one: one.__name__)
def test_importing_a_package_imports_no_heavy_library(package: ModuleType):
    code = f"import {package.__name__}, json, sys; print(json.dumps(sorted(sys.modules)))"
    assert not set(json.loads(python("-c", code))) & set(HEAVY)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda one: one.__name__)
def test_type_checkers_see_the_names_that_python_sees(package: ModuleType):
    checked = type_checked_names(package)
    eager = {*errors.__all__, "__version__"}
    assert set(package.__all__) - eager == set(checked) - eager
    for name, module in checked.items():
        assert getattr(package, name) is getattr(sys.modules[module], name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda one: one.__name__)
def test_every_public_name_is_listed_and_can_be_imported(package: ModuleType):
    assert set(dir(package)) == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'mrege'"):
        getattr(package, "mrege")  # noqa: B009


def test_a_prompt_completes_public_names():
    matches = rlcompleter.Completer({"surgery": surgery}).attr_matches("surgery.extract")
    assert matches == ["surgery.extract_lora("]


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_at_the_top(name: str):
    assert getattr(surgery, name) is getattr(surgery_formats, name) is getattr(errors, name)
    assert issubclass(getattr(surgery, name), surgery.SurgeryError)


def test_python_runs_the_package_as_the_command():
    assert python("-m", "surgery", "--help") == python("-m", "surgery_cli", "--help")


def test_open_gives_a_checkpoint_or_an_adapter():
    base, adapter = surgery.open(str(ROOT / "examples" / "base")), surgery.open(ROOT / "examples" / "lora")
    assert isinstance(base, surgery.Checkpoint)
    assert isinstance(adapter, surgery.Adapter)
    for noun in (base, adapter, adapter * 0.5):
        assert len(repr(noun)) < 400


def test_open_names_what_is_missing(tmp_path):
    with pytest.raises(surgery.NotFoundError) as caught:
        surgery.open(tmp_path / "nowhere")
    assert caught.value.file == str(tmp_path / "nowhere")
    with pytest.raises(surgery.UsageError, match="reference is a path, not int"):
        surgery.open(7)
