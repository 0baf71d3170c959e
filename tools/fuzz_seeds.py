# SPDX-License-Identifier: Apache-2.0
"""What the fuzzer of readers starts from: every golden file, and every kind of update in every format that writes it without a base."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "formats", "cli") if str(ROOT / part) not in sys.path]

from surgery_formats.adapters.registry import format_at, formats, read_adapter  # noqa: E402
from surgery_formats.canonical.adapter import Site  # noqa: E402
from surgery_formats.containers.registry import container_at  # noqa: E402
from surgery_formats.errors import SurgeryError  # noqa: E402
from surgery_formats.testing.format import save  # noqa: E402
from tests.support.gguf_file import F32, GgufTensor, RawGguf, text, u32  # noqa: E402
from tests.support.updates import EVERY_KIND, made_adapter  # noqa: E402

__all__ = ["ROOT", "Seed", "readers", "seeds"]

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


@dataclass(frozen=True)
class Seed:
    """A file or a folder.

    Attributes:
        name: Where it is from.
        reader: ``format:NAME`` or ``container:NAME``.
        files: Contents by name; one file that is its own adapter or model stands alone.
        alone: Whether a reader is given the file, and not the folder around it.
    """

    name: str
    reader: str
    files: dict[str, bytes]
    alone: bool


def readers() -> list[str]:
    """All that have to be covered."""
    from surgery_formats.containers.registry import containers

    return [f"format:{name}" for name in formats()] + [f"container:{name}" for name in containers()]


def seeds() -> list[Seed]:
    """All seeds, in an order that depends on the tree alone."""
    found = [seed for place in PLACES for seed in _within(ROOT / place)]
    return [*found, *_rendered(), *_several_files()]


def _within(folder: Path) -> Iterator[Seed]:
    if not folder.is_dir():
        return
    folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    for path in folders:
        yield from _of(path)
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix not in (".py", ".md", ".json", ".yaml"):
                yield from _of(file)


def _of(path: Path) -> Iterator[Seed]:
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
        yield Seed(name, f"format:{known.name}", files, path.is_file())
        return
    try:
        container = container_at(path)
        container.open(path)
    except SurgeryError:
        return
    yield Seed(name, f"container:{container.name}", files, path.is_file())


def _rendered() -> Iterator[Seed]:
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
                    yield Seed(f"{kind} as {known.name}", f"format:{known.name}", files, path.is_file())


def _several_files() -> Iterator[Seed]:
    """The containers of several files of which no golden one is small."""
    weights = (ROOT / "tests/golden/dotted/diffusers/base.safetensors").read_bytes()
    index = json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}).encode()
    config = json.dumps({"_class_name": "FluxTransformer2DModel"}).encode()
    network = "transformer/diffusion_pytorch_model.safetensors"
    files = {"model_index.json": index, "transformer/config.json": config, network: weights}
    yield Seed("a pipeline", "container:pipeline", files, alone=False)
    parts = {}
    for number, names in enumerate((["token_embd.weight"], ["a", "b"])):
        own = [("split.no", u32(number)), ("split.count", u32(2)), ("split.tensors.count", u32(3))]
        entries = [("general.architecture", text("llama")), *own] if number == 0 else own
        raw = RawGguf(entries, {name: GgufTensor(F32, (2, 3), bytes(24)) for name in names})
        parts[f"m-{number + 1:05d}-of-00002.gguf"] = raw.data()
    yield Seed("splits", "container:gguf-splits", parts, alone=False)
    yield Seed("a graph", "container:onnx", {"model.onnx": _graph(), "a.data": bytes(96)}, alone=True)


def _graph() -> bytes:
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
