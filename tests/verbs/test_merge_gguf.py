# SPDX-License-Identifier: Apache-2.0
"""A GGUF base and an adapter of PEFT: what transformers' model would become, in GGUF, with the types that were asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery_formats.arrays import Array
from surgery_formats.containers.gguf.header import read_header
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.raw import open_file
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.component import Component
from surgery_formats.storage.gguf.affine import AffineGrid
from surgery_formats.storage.gguf.legacy import LEGACY
from surgery_formats.tensors.ggml import BY_NAME
from tests.containers.golden.make_gguf_models import values
from tests.support.gguf_file import Q8_0, GgufTensor, RawGguf, text, u32
from tests.support.kit import ROOT

GOLDEN = ROOT / "tests" / "containers" / "golden"
CONFIGS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "configs.json").read_text())
MODELS = [name for name in CONFIGS if name != "wide"]
EXPERT = {"gate_proj": ("w1", "gate_proj"), "up_proj": ("w3", "up_proj"), "down_proj": ("w2", "down_proj")}
RANK = 3


def main(path: Path) -> Component:
    return open_checkpoint(path).main


def apart(component: Component) -> dict[str, Array]:
    """Every weight as transformers stores it: experts one by one."""
    weights: dict[str, Array] = {}
    for name, parameter in component.parameters.items():
        held = parameter.get(None).astype(np.float32)
        if "switch_mlp." in name:
            block, _, part = name.removesuffix(".weight").rpartition("switch_mlp.")
            spelling = EXPERT[part]["block_sparse_moe" not in name]
            for number, expert in enumerate(held.reshape(parameter.sizes)):
                weights[f"{block}experts.{number}.{spelling}.weight"] = expert
        elif name != "rope_freqs.weight":
            turned = component.family.stores_transposed(name)
            weights[name] = np.ascontiguousarray(held.T if turned else held).reshape(parameter.sizes)
    return weights


def twin(folder: Path, name: str) -> Path:
    """The golden model as a folder of transformers."""
    folder.mkdir()
    save_file(apart(main(GOLDEN / f"{name}.gguf")), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def adapter(folder: Path, weights: Mapping[str, Array], conv1d: bool = False, scale: float = 1.0) -> Path:
    """A LoRA of PEFT on every matrix of `weights`."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(3)
    tensors, targets = {}, []
    for name, held in weights.items():
        if held.ndim != 2 or not name.endswith(".weight"):
            continue
        out, inputs = held.shape[::-1] if conv1d else held.shape
        module = name.removesuffix(".weight")
        targets.append(module)
        for side, shape in (("A", (RANK, inputs)), ("B", (out, RANK))):
            factor = draw.standard_normal(shape).astype(np.float32) * np.float32(0.1 * scale)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = factor
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": conv1d}))
    return folder


def layer_weights(component: Component) -> dict[str, Array]:
    """Those of layers, which no tie touches."""
    return {name: held for name, held in apart(component).items() if ".layers." in name or ".h." in name}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_becomes_what_its_model_in_transformers_becomes(name: str, tmp_path: Path) -> None:
    base = GOLDEN / f"{name}.gguf"
    lora = adapter(tmp_path / "lora", layer_weights(main(base)), conv1d=name == "gpt2")
    surgery.merge(base, lora, output=tmp_path / "gguf")
    surgery.merge(twin(tmp_path / "twin", name), lora, output=tmp_path / "hf")
    merged = apart(main(tmp_path / "gguf"))
    expected = dict(main(tmp_path / "hf").parameters.items())
    assert merged.keys() == expected.keys()
    changed = 0
    for key, held in merged.items():
        wanted = expected[key].storage.elements.read()
        before = values_before(base, key)
        changed += not np.array_equal(held, before)
        assert np.abs(held - wanted).max() <= np.abs(wanted).max() * 2**-11, key
    assert changed == sum(held.ndim == 2 for key, held in merged.items() if ".layers." in key or ".h." in key)


def values_before(base: Path, key: str) -> Array:
    return apart(main(base))[key]


@pytest.mark.parametrize("way", ["dequantize", "requantize"])
def test_quantised_by_llama_cpp_and_merged(way: str, tmp_path: Path) -> None:
    """Types stay, or all blocks become F16; what is not touched has its bytes; key-values have theirs."""
    base = GOLDEN / "wide.gguf"
    touched = {key: held for key, held in layer_weights(main(base)).items() if "k_proj" not in key}
    lora = adapter(tmp_path / "lora", touched, scale=3)
    result = surgery.merge(base, lora, output=tmp_path / "out", quantized=way)
    before, after = main(base), main(tmp_path / "out")
    headers = [read_header(shard.file) for shard in (before.shards[0], after.shards[0])]
    types = [{tensor.name: tensor.packed_as for tensor in header.tensors} for header in headers]
    if way == "requantize":
        assert types[0] == types[1]
        assert headers[0].begin == headers[1].begin
    else:
        assert {types[1][name] for name, type_ in types[0].items() if type_ != "F32"} == {"F16"}
    for key, entry in headers[0].entries.items():
        if key != "general.file_type" or way == "requantize":
            ours = headers[1].entries[key]
            assert headers[1].file.read(ours.offset, ours.nbytes) == headers[0].file.read(entry.offset, entry.nbytes)
    assert headers[1].value("general.file_type") == (
        1 if way == "dequantize" else headers[0].value("general.file_type")
    )
    assert headers[0].entries.keys() == headers[1].entries.keys()
    for name, parameter in before.parameters.items():
        old, new = parameter.get(), after.parameters[name].get().astype(np.float32)
        if name in touched and old.ndim == 2 and ".norm" not in name and "layernorm" not in name:
            A, B = factors(tmp_path / "lora", name)
            apart_ = np.linalg.norm(new - (old + B @ A)) / np.linalg.norm(B @ A)
            assert 0 < apart_ < (1e-3 if way == "dequantize" else 0.35), name
        else:
            mine, theirs = after.parameters[name].sources[0], parameter.sources[0]
            if way == "requantize":
                assert mine.file.read(mine.offset, mine.nbytes) == theirs.file.read(theirs.offset, theirs.nbytes)
            else:
                assert np.array_equal(new, old.astype(np.float16).astype(np.float32)), name
    assert result.ledger.survival > 0.9
    surgery.verify(tmp_path / "out", against=base)
    path = after.shards[0].path
    raw = bytearray(path.read_bytes())
    raw[after.parameters["model.layers.0.self_attn.q_proj.weight"].sources[0].offset] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ProofError, match="changed"):
        surgery.verify(tmp_path / "out")


def in_blocks(path: Path, name: str) -> Path:
    """The golden model with its matrices in Q8_0."""
    codec = next(codec for codec in LEGACY if codec.type.name == "Q8_0")
    header = read_header(open_file(GOLDEN / f"{name}.gguf"))
    entries = []
    for key, entry in header.entries.items():
        start = 8 + len(key.encode())
        entries.append((key, bytes(header.file.read(entry.offset + start, entry.nbytes - start))))
    tensors = {}
    for tensor in header.tensors:
        data = bytes(tensor.file.read(tensor.offset, tensor.nbytes))
        type_ = BY_NAME[tensor.packed_as].number
        if tensor.packed_as == "F16":
            held = tensor.read().astype(np.float32).reshape(-1, tensor.shape[-1] // 32, 32)
            blocks = codec.fit(held)
            grid = AffineGrid.of(codec, blocks)
            codec.pack(grid.nearest(held.reshape(len(held), -1)).reshape(held.shape), blocks)
            type_, data = Q8_0, blocks.tobytes()
        tensors[tensor.name] = GgufTensor(type_, tensor.shape, data)
    return RawGguf(entries, tensors).write(path)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "gemma2", "llama"])
@pytest.mark.parametrize("way", ["dequantize", "requantize"])
def test_blocks_of_experts_and_of_turned_weights_are_merged_into(way: str, name: str, tmp_path: Path) -> None:
    base = in_blocks(tmp_path / f"{name}-Q8_0.gguf", name)
    before = apart(main(base))
    lora = adapter(tmp_path / "lora", layer_weights(main(base)), conv1d=name == "gpt2", scale=2)
    surgery.merge(base, lora, output=tmp_path / "out", quantized=way)
    after = apart(main(tmp_path / "out"))
    for key, held in after.items():
        if held.ndim == 2 and (".layers." in key or ".h." in key):
            A, B = factors(tmp_path / "lora", key)
            update = (B @ A).T if name == "gpt2" else B @ A
            apart_ = np.linalg.norm(held - before[key] - update) / np.linalg.norm(update)
            assert apart_ < (1e-3 if way == "dequantize" else 0.02), key
    kinds = {parameter.storage.kind for parameter in main(tmp_path / "out").parameters.values()}
    assert kinds == ({"F16", "F32"} if way == "dequantize" else {"Q8_0", "F32"})
    surgery.verify(tmp_path / "out", against=base)


def factors(lora: Path, name: str) -> tuple[Array, Array]:
    from safetensors.numpy import load_file

    tensors = load_file(lora / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    return tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"]


def test_splits_stay_splits(tmp_path: Path) -> None:
    """Each file keeps its key-values, and the one without a touched tensor its bytes."""
    blocks = np.random.default_rng(0).integers(1, 60, (3, 4, 34)).astype(np.uint8)
    blocks[..., 1] = 0x20  # scales around 0.01
    names = [["token_embd.weight", "blk.0.attn_q.weight"], ["blk.0.attn_v.weight"]]
    for number, part in enumerate(names):
        own = [("split.no", u32(number)), ("split.count", u32(2)), ("split.tensors.count", u32(3))]
        first = [("general.architecture", text("qwen2")), ("general.file_type", u32(7))] if number == 0 else []
        tensors = {name: GgufTensor(Q8_0, (4, 32), blocks[number + i].tobytes()) for i, name in enumerate(part)}
        RawGguf([*first, *own], tensors).write(tmp_path / f"m-Q8_0-{number + 1:05d}-of-00002.gguf")
    lora = adapter(tmp_path / "lora", {"model.layers.0.self_attn.v_proj.weight": np.zeros((4, 32))})
    surgery.merge(tmp_path / "m-Q8_0-00001-of-00002.gguf", lora, output=tmp_path / "out", quantized="requantize")
    first, second = (tmp_path / f"m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2))
    assert (tmp_path / "out" / first.name).read_bytes() == first.read_bytes()
    merged = (tmp_path / "out" / second.name).read_bytes()
    assert len(merged) == second.stat().st_size
    assert merged != second.read_bytes()
    assert not (tmp_path / "out" / "model.gguf.index.json").exists()
    surgery.verify(tmp_path / "out", against=first)
    surgery.merge(first, lora, output=tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").glob("*.gguf")) == [
        "m-F16-00001-of-00002.gguf",
        "m-F16-00002-of-00002.gguf",
    ]
    assert {p.storage.kind for p in main(tmp_path / "plain" / "m-F16-00002-of-00002.gguf").parameters.values()} == {
        "F16"
    }


def test_a_tied_head_that_parts_is_stored(tmp_path: Path) -> None:
    """llama.cpp takes ``output.weight`` where there is one, and else the embedding."""
    lora = adapter(tmp_path / "lora", {"lm_head.weight": values("x", (12, 32))})
    surgery.merge(GOLDEN / "qwen2.gguf", lora, output=tmp_path / "out")
    component = main(tmp_path / "out")
    assert not component.tied
    base = main(GOLDEN / "qwen2.gguf").parameters["model.embed_tokens.weight"].get().astype(np.float32)
    A, B = factors(tmp_path / "lora", "lm_head.weight")
    head = component.parameters["lm_head.weight"]
    assert head.sources[0].name == "output.weight"
    assert np.abs(head.get().astype(np.float32) - (base + B @ A)).max() < 1e-3
    assert np.array_equal(component.parameters["model.embed_tokens.weight"].get(), base.astype(np.float16))


def test_a_head_trained_in_full_beside_a_tied_embedding_is_stored(tmp_path: Path) -> None:
    held = values("another", (12, 32))
    surgery.merge(GOLDEN / "qwen2.gguf", trained(tmp_path / "lora", "lm_head.weight", held), output=tmp_path / "out")
    head = main(tmp_path / "out").parameters["lm_head.weight"]
    assert (head.sources[0].name, head.storage.kind) == ("output.weight", "F16")
    assert np.abs(head.get().astype(np.float32) - held).max() < 1e-3


def trained(folder: Path, name: str, held: Array) -> Path:
    """An adapter with a weight trained in full."""
    folder.mkdir()
    save_file({f"base_model.model.{name}": held.astype(np.float32)}, folder / "adapter_model.safetensors")
    module = name.removesuffix(".weight").rpartition(".")[2]
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [], "modules_to_save": [module]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return folder


@pytest.mark.parametrize("way", ["dequantize", "requantize"])
def test_a_weight_trained_in_full_takes_the_place_of_blocks(way: str, tmp_path: Path) -> None:
    held = values("another", (12, 256))
    lora = trained(tmp_path / "lora", "lm_head.weight", held)
    surgery.merge(GOLDEN / "wide.gguf", lora, output=tmp_path / "out", quantized=way)
    head = main(tmp_path / "out").parameters["lm_head.weight"]
    assert head.storage.kind == ("F16" if way == "dequantize" else "Q6_K")
    assert np.abs(head.get().astype(np.float32) - held).max() < (1e-3 if way == "dequantize" else 0.02)


def test_what_key_values_would_have_to_describe_is_refused(tmp_path: Path) -> None:
    grown = trained(tmp_path / "grown", "lm_head.weight", values("x", (14, 256)))
    with pytest.raises(FitError, match=r"\[14, 256\]"):
        surgery.merge(GOLDEN / "wide.gguf", grown, output=tmp_path / "out")
    grown = trained(tmp_path / "plain", "model.embed_tokens.weight", values("x", (14, 32)))
    with pytest.raises(FitError, match="the vocabulary and all sizes of a GGUF are among its key-values"):
        surgery.merge(GOLDEN / "qwen3.gguf", grown, output=tmp_path / "out")
    lora = adapter(tmp_path / "lora", layer_weights(main(GOLDEN / "qwen3.gguf")))
    with pytest.raises(FitError, match="the files of its base are kept"):
        surgery.merge(GOLDEN / "qwen3.gguf", lora, output=tmp_path / "out", shard_size=1000)
    head = trained(tmp_path / "head", "score.weight", values("x", (2, 32)))
    with pytest.raises(FitError, match="architecture qwen3 has no place for it"):
        surgery.merge(GOLDEN / "qwen3.gguf", head, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_that_are_only_read_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    blocks = bytes(110) * 4
    tensors = {
        "blk.0.attn_v.weight": GgufTensor(21, (4, 256), blocks),
        "token_embd.weight": GgufTensor(0, (4, 4), bytes(64)),
    }
    base = RawGguf([("general.architecture", text("qwen2"))], tensors).write(tmp_path / "m-IQ3_S.gguf")
    lora = adapter(tmp_path / "lora", {"model.layers.0.self_attn.v_proj.weight": np.zeros((4, 256))})
    with pytest.raises(FitError, match="IQ3_S is read, but not written"):
        surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize", dry_run=True)


def test_a_packed_layout_leaves_the_container(tmp_path: Path) -> None:
    """The model as a folder of safetensors, in the order of graphs: its configuration goes along."""
    base = GOLDEN / "llama.gguf"
    lora = adapter(tmp_path / "lora", {k: v for k, v in layer_weights(main(base)).items() if "q_proj" in k})
    surgery.merge(base, lora, output=tmp_path / "gguf")
    surgery.merge(base, lora, output=tmp_path / "packed", layout="packed")
    packed, own = main(tmp_path / "packed"), main(tmp_path / "gguf")
    assert packed.shards[0].container == "safetensors"
    assert packed.config["model_type"] == "llama"
    for name, parameter in own.parameters.items():
        assert np.array_equal(packed.parameters[name].get(), parameter.get()), name


@pytest.mark.parametrize("way", ["dequantize", "requantize"])
def test_a_merge_is_taken_back_to_the_byte(way: str, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", layer_weights(main(GOLDEN / "wide.gguf")), scale=3)
    surgery.merge(GOLDEN / "wide.gguf", lora, output=tmp_path / "out", quantized=way, reversible=True)
    sidecar = next((tmp_path / "out").glob("*rounding*"))
    surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back", base_rounding=sidecar)
    assert (tmp_path / "back" / "wide.gguf").read_bytes() == (GOLDEN / "wide.gguf").read_bytes()


def test_reports_speak_of_the_model(tmp_path: Path) -> None:
    shutil.copyfile(GOLDEN / "wide.gguf", tmp_path / "w.gguf")
    (component,) = surgery.inspect(tmp_path).components
    assert (component.family, component.facts["layers"], component.facts["vocabulary"]) == ("llama", 1, 12)
    assert {"attention", "mlp", "norm", "embedding", "head"} <= component.roles.keys()
    assert component.dtypes["Q4_K"].parameters > 0
    (mixed,) = surgery.inspect(GOLDEN / "mixtral.gguf").components
    assert mixed.roles["expert"].parameters == 3 * 3 * 32 * 32
    again = surgery.diff(tmp_path / "w.gguf", GOLDEN / "wide.gguf")
    assert again.difference == 0
    assert read_header(open_file(tmp_path / "w.gguf")).value("general.architecture") == "llama"


def test_only_what_is_touched_becomes_16_bits(tmp_path: Path) -> None:
    """llama.cpp takes files of both; the type that a file is said to have stays that of its blocks."""
    base = GOLDEN / "wide.gguf"
    lora = adapter(tmp_path / "lora", {k: v for k, v in layer_weights(main(base)).items() if "up_proj" in k})
    surgery.merge(base, lora, output=tmp_path / "out", only_touched=True)
    before, after = main(base), main(tmp_path / "out")
    for name, parameter in before.parameters.items():
        kind = after.parameters[name].storage.kind
        assert kind == ("F16" if "up_proj" in name else parameter.storage.kind)
    kinds = [read_header(component.shards[0].file).value("general.file_type") for component in (before, after)]
    assert kinds[0] == kinds[1]
    assert after.shards[0].path.name == "wide.gguf"


def test_another_element_type_is_asked_for_by_name(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", layer_weights(main(GOLDEN / "wide.gguf")))
    surgery.merge(GOLDEN / "wide.gguf", lora, output=tmp_path / "out", dtype="bf16")
    component = main(tmp_path / "out")
    kinds = {name: parameter.storage.kind for name, parameter in component.parameters.items()}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"BF16"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert read_header(component.shards[0].file).value("general.file_type") == 32
