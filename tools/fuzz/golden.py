# SPDX-License-Identifier: Apache-2.0
"""Seeds of readers: every golden file, and every kind of update in every format that writes it without a base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy

from surgery_formats.adapters.registry import format_at, formats, read_adapter
from surgery_formats.canonical.adapter import Site
from surgery_formats.containers.registry import container_at
from surgery_formats.errors import SurgeryError
from surgery_formats.testing.format import save
from tests.support.gguf_file import F32, GgufTensor, RawGguf, text, u32
from tests.support.updates import EVERY_KIND, made_adapter

from . import ROOT
from .target import Seed

__all__ = ["golden_files", "golden_graphs", "seeds_of", "small_graph"]

PLACES = ("tests/golden", "tests/containers/golden", "examples")
LARGEST = 100_000
SITES = {
    "GLoRA of a bias": Site("model.layers.0.self_attn.q_proj.bias"),
    "offset of a bias": Site("model.layers.0.self_attn.q_proj.bias"),
    "token rows": Site("model.embed_tokens.weight", module_kind="embedding"),
    "GLoRA of LyCORIS on a convolution": Site("conv.weight", "", False, "convolution", (2, 2)),
    "LoKr of a Conv1d": Site("conv.weight", "", False, "convolution", (2,)),
    "LoKr of a Conv1d, of a pair": Site("conv.weight", "", False, "convolution", (2,)),
    "experts": Site("model.layers.0.mlp.experts.gate_up_proj", module_kind="experts"),
}


@cache
def seeds_of() -> dict[str, Sequence[Seed]]:
    """Seeds by ``format:NAME`` or ``container:NAME``, in an order that depends on the tree alone."""
    found: dict[str, list[Seed]] = {}
    for reader, seed in (
        *(pair for place in PLACES for pair in _within(ROOT / place)),
        *_rendered(),
        *_several_files(),
    ):
        found.setdefault(reader, []).append(seed)
    return dict(found)


@cache
def golden_files(*endings: str) -> Sequence[Seed]:
    """Golden files, each alone, whose names end so."""
    paths = [path for place in PLACES for path in sorted((ROOT / place).rglob("*")) if path.name.endswith(endings)]
    files = [path for path in paths if path.is_file() and 0 < path.stat().st_size <= LARGEST]
    return [Seed(path.relative_to(ROOT).as_posix(), {path.name: path.read_bytes()}) for path in files]


@cache
def golden_graphs() -> Sequence[Seed]:
    """Golden graphs with the files that lie beside them, the graph first."""
    graphs = [(ROOT / seed.name, seed) for seed in golden_files(".onnx")]
    found = []
    for path, seed in graphs:
        beside = {file.name: file for file in sorted(path.parent.iterdir()) if file.is_file() and file != path}
        if sum(file.stat().st_size for file in beside.values()) <= LARGEST:
            found.append(Seed(seed.name, {**seed.files, **{name: file.read_bytes() for name, file in beside.items()}}))
    return found


def _within(folder: Path) -> Iterator[tuple[str, Seed]]:
    if not folder.is_dir():
        return
    folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    for path in folders:
        yield from _of(path)
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix not in (".py", ".md", ".json", ".yaml"):
                yield from _of(file)


def _of(path: Path) -> Iterator[tuple[str, Seed]]:
    """What a path is a seed for: the format that knows it, or else its container."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_file():
        files = {path.name: path.read_bytes()} if path.stat().st_size <= LARGEST else {}
    else:
        beside = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("expected")]
        beside = [file for file in beside if file.suffix != ".py" and "__pycache__" not in file.parts]
        whole = len(beside) <= 16 and sum(file.stat().st_size for file in beside) <= LARGEST
        files = {file.relative_to(path).as_posix(): file.read_bytes() for file in beside} if whole else {}
    if not files:
        return
    if (known := format_at(path)) is not None:
        yield f"format:{known.name}", Seed(name, files, path.is_file())
        return
    try:
        container = container_at(path)
        container.open(path)
    except SurgeryError:
        return
    yield f"container:{container.name}", Seed(name, files, path.is_file())


def _rendered() -> Iterator[tuple[str, Seed]]:
    like = read_adapter(ROOT / "examples" / "lora")
    with TemporaryDirectory(prefix="surgery-fuzz-") as folder:
        for kind, update in EVERY_KIND.items():
            site = SITES.get(kind, Site("model.layers.0.self_attn.q_proj.weight"))
            adapter = made_adapter({site: update}, like)
            for known in formats().values():
                try:
                    rendering = known.render(adapter, None)
                except SurgeryError:
                    continue
                if any(entry.outcome == "dropped" for entry in rendering.entries):
                    continue
                path = save(rendering, known, Path(folder))
                files = (
                    {path.name: path.read_bytes()}
                    if path.is_file()
                    else {p.name: p.read_bytes() for p in path.iterdir()}
                )
                if sum(map(len, files.values())) <= LARGEST:
                    yield f"format:{known.name}", Seed(f"{kind} as {known.name}", files, path.is_file())


def _several_files() -> Iterator[tuple[str, Seed]]:
    """The containers of several files of which no golden one is small."""
    weights = (ROOT / "tests/golden/dotted/diffusers/base.safetensors").read_bytes()
    index = json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}).encode()
    config = json.dumps({"_class_name": "FluxTransformer2DModel"}).encode()
    network = "transformer/diffusion_pytorch_model.safetensors"
    files = {"model_index.json": index, "transformer/config.json": config, network: weights}
    yield "container:pipeline", Seed("a pipeline", files, alone=False)
    parts = {}
    for number, names in enumerate((["token_embd.weight"], ["a", "b"])):
        own = [("split.no", u32(number)), ("split.count", u32(2)), ("split.tensors.count", u32(3))]
        entries = [("general.architecture", text("llama")), *own] if number == 0 else own
        raw = RawGguf(entries, {name: GgufTensor(F32, (2, 3), bytes(24)) for name in names})
        parts[f"m-{number + 1:05d}-of-00002.gguf"] = raw.data()
    yield "container:gguf-splits", Seed("splits", parts, alone=False)
    yield from (("container:onnx", seed) for seed in golden_graphs())
    yield "container:onnx", Seed("a graph", {"model.onnx": small_graph(), "a.data": bytes(96)})


def small_graph() -> bytes:
    """A graph with a weight in it, one in another file, one written value by value, a body and a Constant."""
    from onnx import TensorProto, helper, numpy_helper

    values = numpy_helper.from_array(numpy.arange(24, dtype=numpy.float32).reshape(4, 6), "w")
    other = TensorProto(name="e", data_type=1, dims=(4, 6), data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "a.data"), ("offset", "0"), ("length", "96")):
        other.external_data.add(key=key, value=value)
    typed = helper.make_tensor("t", TensorProto.FLOAT16, (3,), [1, 2, 3])
    out = helper.make_tensor_value_info("o", 1, None)
    body = helper.make_graph([helper.make_node("Constant", [], ["o"], value=values)], "b", [], [out], [values])
    node = helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    x, y = (helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [values, other, typed]), producer_name="seeds")
    data: bytes = model.SerializeToString()
    return data
