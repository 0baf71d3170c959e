# SPDX-License-Identifier: Apache-2.0
"""A plugin that breaks a suite is told which promise it broke, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.mlx import MLX
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.testing.container import CONTAINER_CHECKS, ContainerCase
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase
from tests.support.adapter_files import draw, write_mlx


def mlx(folder: Path) -> Path:
    tensors = {"layer.q.lora_a": draw(1, 40, 3), "layer.q.lora_b": draw(2, 3, 24)}
    return write_mlx(
        folder / "adapter", tensors, lora_parameters={"rank": 3, "scale": 2.0, "dropout": 0.0}, num_layers=1
    )


def like(original: object, **changed: object) -> Any:
    """A plugin's object that does all as `original`, but for some members."""
    members = {name: getattr(original, name) for name in dir(original) if not name.startswith("_")}
    return SimpleNamespace(**members | {"name": "mine"} | changed)


def told(checks: tuple[Callable[..., None], ...], name: str, case: object, folder: Path) -> str:
    (check,) = (check for check in checks if check.__name__ == name)
    with pytest.raises(AssertionError) as caught:
        check(case, folder)
    return str(caught.value)


def test_a_format_that_loses_what_it_read(tmp_path: Path) -> None:
    def halved(adapter: Any, base: Any) -> Rendering:
        rendering = MLX.render(adapter, base)
        first, *rest = rendering.tensors
        return replace(rendering, tensors=(replace(first, load=lambda: first.load() / 2), *rest))

    case = FormatCase(like(MLX, name="mlx", render=halved), mlx)
    said = told(FORMAT_CHECKS, "writes_what_it_reads", case, tmp_path)
    promise = "Read, written and read again, an adapter is the same in the canonical form"
    assert said.startswith(f"the format 'mlx' breaks writes_what_it_reads ({promise}): layer.q.weight: 5.")


def test_a_format_that_does_not_know_its_own_files(tmp_path: Path) -> None:
    said = told(FORMAT_CHECKS, "detects_its_own", FormatCase(like(MLX, detect=lambda path: False), mlx), tmp_path)
    assert said.startswith("the format 'mine' breaks detects_its_own (`detect` knows what the program wrote")
    assert said.endswith("assert case.format.detect(path)")


def test_a_format_that_raises(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        raise KeyError("lora_a")

    said = told(FORMAT_CHECKS, "accounts_for_every_tensor", FormatCase(like(MLX, read=read), mlx), tmp_path)
    assert "the format 'mine' breaks accounts_for_every_tensor (Every tensor is used" in said
    assert "KeyError: 'lora_a', raised at test_promises.py:" in said


def test_a_container_that_opens_truncated_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    whole: dict[str, Any] = {}

    def write(folder: Path, tensors: Any) -> Path:
        path = folder / "model.safetensors"
        save_file(dict(tensors), path)
        whole["opened"] = SAFETENSORS.open(path)
        return path

    case = ContainerCase(like(SAFETENSORS, open=lambda path: whole["opened"]), write)
    said = told(CONTAINER_CHECKS, "refuses_truncated_files", case, tmp_path)
    assert said.startswith(
        "the container 'mine' breaks refuses_truncated_files (A file that is truncated anywhere is malformed)"
    )
    assert "bytes are opened" in said
