# SPDX-License-Identifier: Apache-2.0
"""GGUF files: what llama.cpp wrote is read, what is written differs where it must, and hostile files are refused."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery_formats.arrays import Array, dtype_of
from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.gguf.container import GGUF
from surgery_formats.containers.gguf.header import read_header
from surgery_formats.containers.gguf.rope import rope_scaling
from surgery_formats.containers.gguf.splits import GGUF_SPLITS
from surgery_formats.containers.registry import container_at, open_weights
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.files.raw import open_file
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.families.parameters import model_of
from surgery_formats.tensors.ggml import ggml_type_of
from surgery_formats.testing.container import CONTAINER_CHECKS, ContainerCase
from tests.containers.golden.make_gguf_models import values
from tests.support.gguf_file import F32, Q8_0, GgufTensor, RawGguf, any_value, array, text, u32

GOLDEN = Path(__file__).parent / "golden"
CONFIGS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "configs.json").read_text())
TYPES = (DType.F64, DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32)


def write(folder: Path, tensors: Mapping[str, Array]) -> Path:
    """Without the product."""
    entries = {}
    for name, tensor in tensors.items():
        type_ = ggml_type_of(dtype_of(tensor))
        assert type_ is not None
        entries[name] = GgufTensor(type_.number, tensor.shape, np.ascontiguousarray(tensor).tobytes())
    whole = RawGguf([("general.architecture", text("qwen2"))], entries, padded=False)
    return whole.write(folder / "model.gguf")


@pytest.mark.parametrize("check", CONTAINER_CHECKS, ids=lambda check: check.__name__)
def test_the_container_conforms(check: Callable[[ContainerCase, Path], None], tmp_path: Path) -> None:
    check(ContainerCase(GGUF, write, TYPES), tmp_path)


def expected(name: str, sizes: tuple[int, ...]) -> Array:
    """The values of a weight of the golden models; stacks of experts under the name that transformers gives them."""
    name = name.replace("block_sparse_moe", "mlp")
    block, _, part = name.rpartition("switch_mlp.")
    if not block:
        return values(name, sizes)
    if part == "down_proj.weight":
        return values(f"{block}experts.down_proj", sizes)
    count, rows, columns = sizes
    both = values(f"{block}experts.gate_up_proj", (count, 2 * rows, columns))
    return both[:, :rows] if part == "gate_proj.weight" else both[:, rows:]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "wide"])
def test_models_of_the_converter_have_the_names_and_values_of_transformers(name: str) -> None:
    """Permuted queries and keys, norms with 1 added, stacked experts and transposed weights, all undone exactly."""
    component = open_checkpoint(GOLDEN / f"{name}.gguf").main
    assert component.family.known
    for weight_name, parameter in component.parameters.items():
        if weight_name == "rope_freqs.weight":
            continue
        storage = parameter.storage
        wanted = expected(weight_name, storage.sizes)
        got = parameter.get().reshape(-1, parameter.shape[1])
        if storage.transposed != component.family.stores_transposed(weight_name):
            got = got.T
        wanted = wanted.T if component.family.stores_transposed(weight_name) else wanted
        assert np.array_equal(got.ravel(), np.ascontiguousarray(wanted).ravel()), weight_name


LAYER_NORMS = ("command-r", "phi2", "starcoder2")
"""Types that have no use for the `rms_norm_eps` that all these models were made with."""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_says_what_config_json_said(name: str) -> None:
    component = open_checkpoint(GOLDEN / f"{name}.gguf").main
    original = CONFIGS[name]
    assert component.config["model_type"] == original["model_type"]
    assert component.config["architectures"] == original["architectures"]
    assert component.tied == original["tie_word_embeddings"]
    for key in ("vocab_size", "num_experts_per_tok", "moe_intermediate_size"):
        assert component.config.get(key) == original.get(key), key
    experts = [config.get("num_local_experts", config.get("num_experts")) for config in (component.config, original)]
    assert experts[0] == experts[1]
    if component.family.recipe is not None:  # every number that the computation needs
        names = component.parameters.keys()
        stated = {key: value for key, value in original.items() if key != "rms_norm_eps" or name not in LAYER_NORMS}
        if name == "olmoe":  # llama.cpp writes 1e-5 for OLMoE, whatever the configuration says
            stated["rms_norm_eps"] = 1e-5
        assert model_of(component.config, names) == model_of(stated, names)


def test_quantised_by_llama_cpp() -> None:
    """`llama_model_quantize` to Q4_K_M: K-quants where rows are whole blocks, older types elsewhere."""
    component = open_checkpoint(GOLDEN / "wide.gguf").main
    kinds = {parameter.storage.kind for parameter in component.parameters.values()}
    assert {"Q4_K", "Q6_K", "Q5_0", "F32"} <= kinds
    for name, parameter in component.parameters.items():
        wanted = values(name, parameter.sizes)
        apart = np.abs(parameter.get().reshape(wanted.shape) - wanted)
        assert apart.max() <= (0 if parameter.storage.kind == "F32" else 0.02), name


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unchanged_header_is_kept_to_the_byte(name: str) -> None:
    shard = open_shard(GOLDEN / f"{name}.gguf")
    specs: list[TensorSpec] = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
    layout = GGUF.lay_out(specs, shard)
    raw = shard.path.read_bytes()
    assert layout.header == raw[: shard.header_nbytes]
    assert layout.nbytes == len(raw)
    assert layout.ranges == {tensor.name: (tensor.offset, tensor.nbytes) for tensor in shard.tensors}


def test_key_values_are_kept_but_for_those_that_would_lie(tmp_path: Path) -> None:
    """Stored as float16, a file says so, and nothing any more of how its blocks were chosen."""
    odd = any_value(12, struct.pack("<d", 0.1)), any_value(7, b"\1"), array(5, 2, struct.pack("<2i", -1, 7))
    names = array(8, 2, b"".join(struct.pack("<Q", len(each)) + each for each in (b"a", "\N{SNOWMAN}".encode())))
    entries = [
        ("general.architecture", text("qwen2")),
        ("general.file_type", u32(7)),
        *((f"odd.{i}", value) for i, value in enumerate((*odd, names))),
        ("quantize.imatrix.entries_count", u32(5)),
        ("general.quantization_version", u32(2)),
    ]
    blocks = GgufTensor(Q8_0, (4, 32), bytes(range(34)) * 4)
    path = RawGguf(
        entries, {"blk.0.attn_q.weight": blocks, "output_norm.weight": GgufTensor(F32, (3,), bytes(12))}
    ).write(tmp_path / "a.gguf")
    shard = open_shard(path)
    layout = GGUF.lay_out([("blk.0.attn_q.weight", DType.F16, (4, 32)), ("output_norm.weight", DType.F32, (3,))], shard)
    kept = [(key, u32(1) if key == "general.file_type" else value) for key, value in entries if "imatrix" not in key]
    types = {
        "blk.0.attn_q.weight": GgufTensor(1, (4, 32), bytes(256)),
        "output_norm.weight": GgufTensor(0, (3,), bytes(12)),
    }
    assert layout.header == RawGguf(kept, types).header()
    assert layout.nbytes == len(layout.header) + 256 + 32


def test_what_a_gguf_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    shard = open_shard(RawGguf([], {"x": GgufTensor(Q8_0, (4, 32), bytes(136))}).write(tmp_path / "a.gguf"))
    for specs, fault in (
        ([("y", DType.U8, (4, 35))], r"no type for U8 \[4, 35\]"),
        ([("y", DType.BOOL, (4,))], r"no type for BOOL"),
        ([("y" * 64, DType.F32, (4,))], "63 bytes of a name"),
        ([("y", DType.F32, (1,) * 5)], "4 axes"),
        ([("y", DType.F32, (1,)), ("y", DType.F32, (1,))], "two tensors of one name"),
    ):
        with pytest.raises(FitError, match=fault):
            GGUF.lay_out(specs, shard)
    assert GGUF.lay_out([("z", DType.U8, (4, 34))], shard).ranges["z"][1] == 136  # as the one tensor of that shape


BASE = RawGguf([("general.architecture", text("qwen2"))], {"a": GgufTensor(F32, (2, 3), bytes(24))})
HOSTILE: Mapping[str, tuple[RawGguf, str]] = {
    "magic": (replace(BASE, magic=b"GGUX"), "is no GGUF"),
    "old": (replace(BASE, version=struct.pack("<I", 1)), "version 1"),
    "new": (replace(BASE, version=struct.pack("<I", 4)), "version 4"),
    "big endian": (replace(BASE, version=struct.pack(">I", 3)), "big endian"),
    "tensors": (replace(BASE, counts=(1 << 60, 1)), "1152921504606846976 tensors"),
    "keys": (replace(BASE, counts=(1, 1 << 60)), "1152921504606846976 key-values"),
    "key twice": (replace(BASE, entries=[("a", u32(1))] * 2), "'a' appears twice"),
    "empty key": (replace(BASE, entries=[("", u32(1))]), "a key is empty"),
    "long key": (replace(BASE, entries=[("k" * 70000, u32(1))]), "a key of 70000 bytes"),
    "unknown type": (replace(BASE, entries=[("a", any_value(13, b""))]), "unknown type 13"),
    "long text": (replace(BASE, entries=[("a", any_value(8, struct.pack("<Q", 1 << 61)))]), "a value of 2305843009"),
    "array": (replace(BASE, entries=[("a", array(4, 1 << 60, b""))]), "array of 1152921504606846976 values"),
    "array of text": (replace(BASE, entries=[("a", array(8, 1 << 60, b""))]), "array of 1152921504606846976 values"),
    "nested": (replace(BASE, entries=[("a", array(9, 1, bytes(12)))]), "array of the type 9"),
    "alignment": (replace(BASE, entries=[("general.alignment", u32(48))]), "48, which is no power of two"),
    "no alignment": (replace(BASE, entries=[("general.alignment", u32(0))]), "no power of two"),
    "textual alignment": (replace(BASE, entries=[("general.alignment", text("32"))]), "no power of two"),
    "name": (replace(BASE, names=[b"x" * 64]), "name of 64 bytes"),
    "name of no text": (replace(BASE, names=[b"\xff"]), "not UTF-8"),
    "axes": (replace(BASE, tensors={"a": GgufTensor(F32, (1,) * 5, bytes(4))}), "5 axes"),
    "overflow": (replace(BASE, tensors={"a": GgufTensor(F32, (1 << 40, 1 << 40), b"")}), "overflow"),
    "no type": (replace(BASE, tensors={"a": GgufTensor(5, (2,), b"")}), "type 5 is not known"),
    "blocks": (replace(BASE, tensors={"a": GgufTensor(Q8_0, (2, 31), b"")}), "not whole blocks of Q8_0"),
    "scalar block": (replace(BASE, tensors={"a": GgufTensor(Q8_0, (), b"")}), "not whole blocks"),
    "offset": (replace(BASE, tensors={"a": GgufTensor(F32, (2,), bytes(8), offset=32)}), "lies at 32"),
    "overlap": (
        replace(BASE, tensors={"a": GgufTensor(F32, (2,), bytes(8)), "b": GgufTensor(F32, (2,), bytes(8), offset=0)}),
        "lies at 0 of the data, not at 32",
    ),
    "outside": (replace(BASE, tensors={"a": GgufTensor(F32, (1 << 20,), bytes(8))}), "not inside the file"),
    "tensor twice": (
        replace(BASE, tensors={"a": GgufTensor(F32, (8,), bytes(32)), "b": GgufTensor(F32, (8,), bytes(32))}, names=[b"a", b"a"]),
        "the name appears twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_at_once(name: str, tmp_path: Path) -> None:
    raw, fault = HOSTILE[name]
    path = raw.write(tmp_path / "a.gguf")
    started = time.process_time()
    with pytest.raises(MalformedError, match=fault) as caught:
        read_header(open_file(path))
    assert time.process_time() - started < 1
    assert caught.value.file == str(path)


@pytest.mark.parametrize("name", ["llama", "wide"])
def test_any_damage_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    """Bytes of the header mutated: opened and read, or refused; nothing else is raised."""
    raw = (GOLDEN / f"{name}.gguf").read_bytes()
    begin = open_shard(GOLDEN / f"{name}.gguf").header_nbytes
    draw = random.Random(5)
    path = tmp_path / "a.gguf"
    refused = 0
    for round_ in range(1500):
        damaged = bytearray(raw)
        for _ in range(draw.choice((1, 1, 2, 8))):
            damaged[draw.randrange(begin if round_ % 4 else len(raw))] = draw.choice(
                (0, 1, 127, 128, 255, draw.randrange(256))
            )
        path.write_bytes(damaged)
        try:
            component = open_checkpoint(path).main
            if round_ % 10 == 0:
                for parameter in component.parameters.values():
                    with np.errstate(all="ignore"):
                        parameter.get()
        except SurgeryError:
            refused += 1
    assert 100 < refused < 1500


ODD = {
    "zero": u32(0),
    "large": u32(0xFFFFFFFF),
    "negative": any_value(5, struct.pack("<i", -7)),
    "text": text("odd"),
    "truth": any_value(7, b"\1"),
    "nan": any_value(6, struct.pack("<f", float("nan"))),
    "infinite": any_value(6, struct.pack("<f", float("-inf"))),
    "greatest": any_value(6, b"\xff\xff\x7f\x7f"),
    "none": array(4, 0, b""),
    "two": array(4, 2, struct.pack("<2I", 1, 2)),
    "texts": array(8, 1, struct.pack("<Q", 1) + b"x"),
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("odd", ODD)
def test_key_values_of_odd_types_and_sizes_are_errors_of_ours(odd: str, name: str, tmp_path: Path) -> None:
    """Each in turn; of Llama also the factors of its positions."""
    header = read_header(open_file(GOLDEN / f"{name}.gguf"))
    raw = header.file.read(0, header.file.size)
    opened = 0
    for key, entry in header.entries.items():
        start = 8 + len(key.encode())
        head = struct.pack("<IQQ", 3, len(header.tensors), len(header.entries))
        body = raw[24 : entry.offset] + raw[entry.offset : entry.offset + start] + ODD[odd]
        last = max(other.offset + other.nbytes for other in header.entries.values())
        body += raw[entry.offset + entry.nbytes : last] + raw[last : header.begin]
        whole = b"GGUF" + head + bytes(body)
        path = tmp_path / "a.gguf"
        path.write_bytes(whole.rstrip(b"\0") + bytes(4096) + bytes(raw[header.begin :]))
        try:
            component = open_checkpoint(path).main
            parameters = list(component.parameters)
            opened += 1
            if component.family.recipe is not None:
                model_of(component.config, parameters)
        except SurgeryError:
            continue
    assert opened > len(header.entries) // 2


def test_factors_of_positions_that_are_none_are_no_fault(tmp_path: Path) -> None:
    raw = bytearray((GOLDEN / "llama.gguf").read_bytes())
    factors = {t.name: t for t in open_shard(GOLDEN / "llama.gguf").tensors}["rope_freqs.weight"]
    for value in (0.0, float("nan"), float("inf"), -1.0, 5.0):
        raw[factors.offset : factors.offset + factors.nbytes] = struct.pack("<f", value) * factors.numel
        (tmp_path / "a.gguf").write_bytes(raw)
        component = open_checkpoint(tmp_path / "a.gguf").main
        assert component.config["rope_scaling"] == {"rope_type": "rope_freqs of a GGUF"}
        with pytest.raises(FitError, match="rope_type is 'rope_freqs of a GGUF'"):
            model_of(component.config, component.parameters.keys())


def test_an_adapter_or_an_encoder_is_no_model(tmp_path: Path) -> None:
    for kind, what in (("adapter", "a LoRA for llama.cpp"), ("mmproj", "a vision or audio encoder")):
        path = replace(BASE, entries=[("general.type", text(kind))]).write(tmp_path / "a.gguf")
        with pytest.raises(FitError, match=what):
            open_checkpoint(path)


def split(folder: Path, names: list[list[str]], total: int | None = None) -> list[Path]:
    """`BASE` and more tensors in several files, as llama-gguf-split has them."""
    count = len(names)
    paths = []
    for number, part in enumerate(names):
        own = [("split.no", u32(number)), ("split.count", u32(count))]
        own.append(("split.tensors.count", u32(sum(map(len, names)) if total is None else total)))
        entries = [*(BASE.entries if number == 0 else ()), *own]
        tensors = {name: GgufTensor(F32, (2, 3), name[:1].encode() * 24) for name in part}
        paths.append(RawGguf(entries, tensors).write(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_splits_are_one_model(tmp_path: Path) -> None:
    paths = split(tmp_path, [["a"], ["b", "c"], ["d"]])
    for path in (tmp_path, *paths):
        assert container_at(path) is GGUF_SPLITS
        (weights,) = open_weights(path).values()
        assert list(weights.tensors) == ["a", "b", "c", "d"]
        assert weights.config["general.architecture"] == "qwen2"
        assert [shard.container for shard in weights.shards] == ["gguf"] * 3
    assert [tensor.name for tensor in open_shard(paths[1]).tensors] == ["b", "c"]


@pytest.mark.parametrize("fault", ["missing", "count", "twice", "swapped", "another beside", "link"])
def test_splits_that_do_not_belong_together_are_refused(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    names = [["a"], ["a"]] if fault == "twice" else [["a"], ["b"]]
    first, second = split(folder, names, 3 if fault == "count" else None)
    match = {"count": "has 2 tensors|have 2 tensors, not 3", "twice": "of one name", "missing": "is missing"}.get(
        fault, ""
    )
    if fault == "missing":
        second.unlink()
    elif fault == "swapped":
        first.rename(folder / "x"), second.rename(first), (folder / "x").rename(second)
        match = "says it is split 1 of 2, not 0 of 2"
    elif fault == "another beside":
        BASE.write(folder / "other.gguf")
        match = "3 files of weights"
    elif fault == "link":
        second.rename(tmp_path / "elsewhere.gguf")
        second.symlink_to(tmp_path / "elsewhere.gguf")
        match = "link out of its folder"
    with pytest.raises(MalformedError, match=match):
        open_weights(folder)


def test_a_folder_with_safetensors_is_not_one_of_splits(tmp_path: Path) -> None:
    split(tmp_path, [["a"], ["b"]])
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not GGUF_SPLITS.detect(tmp_path)


@pytest.mark.parametrize("suffix", ["scaling.factor", "scale_linear"])
def test_a_scale_of_positions_is_in_the_configuration(suffix: str, tmp_path: Path) -> None:
    factor = struct.pack("<If", 6, 4.0)
    entries = [("general.architecture", text("llama")), (f"llama.rope.{suffix}", factor)]
    header = read_header(open_file(RawGguf(entries).write(tmp_path / "a.gguf")))
    assert rope_scaling(header, {}, 64, 10000.0) == {"rope_type": "linear", "factor": 4.0}
