# SPDX-License-Identifier: Apache-2.0
"""What the makers of graphs share: which bases there are, and what is said beside a graph."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import onnx

NOTES = ("namespace", *(f"pkg.torch.onnx.{note}" for note in ("stack_trace", "class_hierarchy", "fx_node")))
HERE = Path(__file__).resolve().parent


def base(name: str) -> Path:
    return HERE / "bases" / name / "base"


def say(folder: Path, name: str, packages: list[str], **more: object) -> None:
    """Write which base a graph was made of, and with what."""
    versions = {package: version(package) for package in packages}
    (folder / "pair.json").write_text(json.dumps({"base": name, **more, "versions": versions}, indent=1) + "\n")


def strip(path: Path) -> None:
    """Take out where on this machine the traced code lies, and notes that are bulky; nothing else of the file changes."""
    model = onnx.load(path, load_external_data=False)
    for function in (model.graph, *model.functions):
        for node in function.node:
            kept = [prop for prop in node.metadata_props if prop.key not in NOTES]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
    path.write_bytes(model.SerializeToString(deterministic=True))


@contextmanager
def scratch() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp())
    try:
        yield place
    finally:
        shutil.rmtree(place)
