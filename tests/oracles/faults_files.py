# SPDX-License-Identifier: Apache-2.0
"""Faults of files and folders: missing, cut off, lying, executable, special files, and bases that are not what they say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.oracles import disk, hostile, models
from tests.oracles.faults import MARKER, fault

__all__: list[str] = []


# --- files --------------------------------------------------------------------------------------------------------------------
def _file(
    name: str, codes: int | tuple[int, ...], write: Callable[[Path, bytes], Any], *mentions: str, **more: Any
) -> None:
    """A fault made by writing another tensor file: ``write(path, good_bytes)``."""

    @fault(name, codes, *(mentions or ("adapter_model.safetensors",)), **more)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        shutil.copytree(adapter, folder / "bad")
        path = folder / "bad" / "adapter_model.safetensors"
        data = path.read_bytes()
        path.unlink()
        write(path, data)
        return base, folder / "bad"


_file("tensor-file-missing", 3, lambda path, data: None, "adapter_model")
_file("tensor-file-empty", 3, lambda path, data: path.write_bytes(b""))
_file("tensor-file-cut-off", 3, lambda path, data: path.write_bytes(data[: len(data) * 2 // 3]))
_file("tensor-file-cut-in-header", 3, lambda path, data: path.write_bytes(data[:100]))
_file("tensor-file-too-long", 3, lambda path, data: path.write_bytes(data + b"\0" * 64))
_file("tensor-file-is-a-folder", 3, lambda path, data: path.mkdir(), "adapter_model")
_file("tensor-file-is-a-fifo", 3, lambda path, data: os.mkfifo(path))
_file("tensor-file-is-dev-zero", 3, lambda path, data: path.symlink_to("/dev/zero"), "adapter_model")
_file("tensor-file-dangles", 3, lambda path, data: path.symlink_to("nowhere"), "adapter_model")
for _name, _lie in hostile.LIES.items():
    _file(f"header-{_name}", 3, lambda path, data, lie=_lie: path.write_bytes(lie(data)))
for _name, _pickle in hostile.PICKLES.items():
    _file(
        f"pickle-{_name}",
        3,
        lambda path, data, write=_pickle: write(path.with_suffix(".bin"), path.parent.parent / MARKER),
        "adapter_model.bin",
    )


@fault("config-is-a-fifo", 3, "adapter_config.json")
def _config_fifo(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    shutil.copytree(adapter, folder / "bad")
    (folder / "bad" / "adapter_config.json").unlink()
    os.mkfifo(folder / "bad" / "adapter_config.json")
    return base, folder / "bad"


@fault("adapter-missing", 3, "nowhere")
def _missing(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    return base, folder / "nowhere"


@fault("adapter-folder-empty", 3, "empty")
def _empty(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    (folder / "empty").mkdir(parents=True)
    return base, folder / "empty"


@fault("full-model-as-adapter", (4, 3))
def _full_model(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    config, _ = disk.adapter(adapter)
    return base, disk.write_adapter(folder / "bad", config, {k: v + 0.1 for k, v in disk.read_tensors(base).items()})


@fault("model-folder-as-adapter", (3, 4))
def _model_folder(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    return base, models.build_base("llama", folder / "model", seed=3)


@fault("adapter-folder-as-base", (3, 4))
def _adapter_folder(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    return adapter, adapter


# --- bases --------------------------------------------------------------------------------------------------------------------
def _base(
    name: str, codes: int | tuple[int, ...], damage: Callable[[Path], Any], *mentions: str, layout: str = "sharded"
) -> None:
    """A fault in the base; its folder is given to ``damage``."""

    @fault(name, codes, *mentions)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        damaged = models.build_base("llama", folder / "damaged", layout=layout)
        damage(damaged)
        return damaged, adapter


def _index(change: Callable[[dict[str, str], Path], Any]) -> Callable[[Path], None]:
    """Change the weight map of a sharded base."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        fields = json.loads(path.read_text())
        change(fields["weight_map"], folder)
        path.write_text(json.dumps(fields))

    return damage


def _outside(to: Callable[[Path], str]) -> Callable[[dict[str, str], Path], None]:
    def change(weight_map: dict[str, str], folder: Path) -> None:
        shard = weight_map["lm_head.weight"]
        shutil.move(folder / shard, folder.parent / "secret.safetensors")
        for key in [k for k, v in weight_map.items() if v == shard]:
            weight_map[key] = to(folder)

    return change


_base("weight-map-goes-up", 3, _index(_outside(lambda folder: "../secret.safetensors")), "model.safetensors.index.json")
_base(
    "weight-map-is-absolute",
    3,
    _index(_outside(lambda folder: str(folder.parent / "secret.safetensors"))),
    "model.safetensors.index.json",
)
_base("shard-missing", 3, lambda folder: next(iter(sorted(folder.glob("model-*")))).unlink(), "model-00001")
_base(
    "index-names-a-missing-tensor",
    3,
    _index(lambda m, f: m.update({"model.ghost.weight": next(iter(m.values()))})),
    "model.ghost.weight",
)
_base("index-misses-a-tensor", (3, 4), _index(lambda m, f: m.pop("model.layers.0.self_attn.q_proj.weight")), "q_proj")
_base(
    "index-is-a-list",
    3,
    lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
    "model.safetensors.index.json",
)
_base("base-cut-off", 3, lambda folder: _cut(folder / "model.safetensors"), "model.safetensors", layout="safetensors")
_base(
    "base-is-a-fifo",
    3,
    lambda folder: (_cut(folder / "model.safetensors", 0), os.mkfifo(folder / "model.safetensors")),
    "model.safetensors",
    layout="safetensors",
)


def _cut(path: Path, share: float = 0.7) -> None:
    """Cut a file off; remove it where nothing is left."""
    data = path.read_bytes()
    path.unlink()
    if share:
        path.write_bytes(data[: int(len(data) * share)])
