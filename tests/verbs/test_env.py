# SPDX-License-Identifier: Apache-2.0
"""Environment and catalogue: read off the installation, not off a list that rots."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery_formats.adapters.registry import formats
from surgery_formats.models.families.registry import families, family_of

ROOT = Path(__file__).parents[2]


def install(folder: Path, name: str, version: str) -> None:
    """A distribution, as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def versions() -> dict[str, str | None]:
    return {package.name: package.version for package in surgery.env().packages}


def test_versions_are_the_installed_ones() -> None:
    found = versions()
    for name in ("torch", "numpy", "safetensors", "onnx", "click"):
        assert found[name] == metadata.version(name)
    assert surgery.env().version == surgery.__version__
    assert surgery.env().python == sys.version.split()[0]


def test_what_is_not_installed_has_no_version_and_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, "torch", "9.9.9")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = surgery.env()
    assert {package.name for package in found.packages if package.version} == {"torch"}
    assert any("numpy" in finding.what and "pip install" in finding.cure for finding in found.findings)
    assert not any("onnx" in finding.what for finding in found.findings)  # an extra
    assert re.search(r"^onnxruntime +not installed: pip install 'model-surgery\[onnx\]'$", str(found), re.M)


def test_two_onnxruntimes_are_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def findings() -> list[str]:
        return [
            f"{finding.what} -> {finding.cure}" for finding in surgery.env().findings if "onnxruntime" in finding.what
        ]

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install(tmp_path, "onnxruntime", "1.32.0")
    assert findings() == []
    install(tmp_path, "onnxruntime-gpu", "1.31.1")
    assert len(findings()) == 1
    assert "onnxruntime-gpu and onnxruntime are both installed" in findings()[0]
    assert findings()[0].endswith("pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime-gpu")
    assert versions()["onnxruntime"] == "1.32.0"
    assert versions()["onnxruntime-gpu"] == "1.31.1"


@pytest.mark.parametrize(("answer", "status"), [("", 9), (None, 0)])
def test_no_driver_is_no_gpu(answer: str | None, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if answer is not None:
        tool(tmp_path, answer, status)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert surgery.env().gpus == ()


def test_a_gpu_without_a_cuda_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool(tmp_path, "NVIDIA H100 80GB HBM3, 570.86.15, 81559", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    install(tmp_path / "site", "torch", "2.13.0+cpu")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    found = surgery.env()
    assert [(gpu.name, gpu.driver, gpu.nbytes) for gpu in found.gpus] == [
        ("NVIDIA H100 80GB HBM3", "570.86.15", 81559 << 20)
    ]
    assert any("built without CUDA" in finding.what for finding in found.findings)


def tool(folder: Path, answer: str, status: int) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
    file.chmod(0o755)


def test_cores_and_memory_are_those_of_this_process() -> None:
    found = surgery.env()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory_nbytes is not None
    assert 1 << 28 < found.memory_nbytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_nothing_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, json, surgery\n"
        "json.dumps(surgery.env().as_json(), allow_nan=False)\n"
        "json.dumps(surgery.formats().as_json(), allow_nan=False)\n"
        "print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'peft', 'click'} & set(sys.modules)))"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "formats")))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.stdout.strip() == "[]"


def test_a_deep_look_says_how_an_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not there
    found = surgery.env(deep=True).deep
    assert found["torch"].startswith(torch.__version__)
    assert "ModuleNotFoundError" in found["onnxruntime"]


def test_every_format_and_family_is_listed() -> None:
    found = surgery.formats()
    assert [entry.name for entry in found.formats] == list(formats())
    assert {name for entry in found.families for name in entry.model_types} == {n for f in families() for n in f.names}
    assert len(found.families) == len(list(families()))
    assert all(entry.title for entry in (*found.formats, *found.families))
    for family in families():
        for name in family.names:
            if family.recipe and not family.embedding:  # a recipe alone: transformers tells the names
                assert family_of({"model_type": name}).recipe is family.recipe
            else:
                assert family_of({"model_type": name}).names == family.names


def test_every_kind_of_update_has_its_equation() -> None:
    found = {entry.name: entry for entry in surgery.formats().updates}
    assert found["LoRA"].equation == "W' = W + s B A"
    assert "arXiv:2106.09685" in found["LoRA"].title
    assert found["DoRA"].needs_weight
    assert not found["LoRA"].needs_weight
    texts = [path.read_text() for path in (ROOT / "formats/surgery_formats/updates").glob("*.py")]
    several = [line for text in texts for line in text.splitlines() if line.startswith("    kinds: ClassVar[tuple")]
    names = sum(text.count("    kind: ClassVar[str] =") for text in texts) + sum(
        line.count('"') // 2 for line in several
    )
    assert len(found) == names
    assert all("=" in entry.equation for entry in found.values())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_every_container_listed_is_read(name: str, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 2)}
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    assert any(Path(name).suffix in container.files for container in surgery.formats().containers if container.reads)
    assert json.loads(json.dumps(surgery.inspect(tmp_path / name).as_json()))["parameters"] == 8
