# SPDX-License-Identifier: Apache-2.0
"""Golden files of several models: what a program encoded, under which configuration, and what it decodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["Case", "read_cases", "write_or_check"]


@dataclass(frozen=True)
class Case:
    """Weights of one model.

    Attributes:
        tensors: As they are stored.
        decoded: What the weights stand for, by name: float32, or what a program rounded them to.
        config: ``quantization_config`` of its config.json; empty if it has none.
    """

    tensors: Mapping[str, torch.Tensor]
    decoded: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


def read_cases(path: Path) -> dict[str, Case]:
    with safe_open(path, "pt") as file:
        cases = {name: Case({}, {}, config) for name, config in json.loads(file.metadata()["configs"]).items()}
        for key in file.keys():  # noqa: SIM118  # the file is no mapping
            case, part, name = key.split("|")
            dict.__setitem__(getattr(cases[case], part), name, file.get_tensor(key))
    return cases


def write_or_check(path: Path, cases: Mapping[str, Case], packages: Iterable[str]) -> None:
    """Write the file, or with ``--check`` compare it with what the packages make now."""
    versions = {package: version(package) for package in packages}
    if "--check" in sys.argv:
        before = read_cases(path)
        assert before.keys() == cases.keys(), before.keys() ^ cases.keys()
        for name, case in cases.items():
            assert before[name].config == json.loads(json.dumps(case.config)), name
            for old, new in ((before[name].tensors, case.tensors), (before[name].decoded, case.decoded)):
                assert old.keys() == new.keys(), name
                assert all(_same(old[key], new[key]) for key in new), name
        print("the same", versions)
        return
    flat = {
        f"{name}|{part}|{key}": tensor.contiguous().clone()
        for name, case in cases.items()
        for part in ("tensors", "decoded")
        for key, tensor in getattr(case, part).items()
    }
    configs = json.dumps({name: case.config for name, case in cases.items()})
    save_file(flat, path, {"configs": configs, "versions": json.dumps(versions)})
    print(path.stat().st_size, "bytes", versions)


def _same(old: torch.Tensor, new: torch.Tensor) -> bool:
    return old.dtype is new.dtype and old.shape == new.shape and _bytes(old) == _bytes(new)


def _bytes(tensor: torch.Tensor) -> bytes:
    return torch.cat([tensor.flatten()]).view(torch.uint8).numpy().tobytes()
