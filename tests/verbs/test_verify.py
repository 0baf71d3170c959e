# SPDX-License-Identifier: Apache-2.0
"""``surgery verify`` passes what is as it was meant, and ends with exit code 5 on every fault put in here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery.verification.graph_proof import TOLERANCE
from surgery.verification.onnx import compare_prompt
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError
from tests.oracles import recipes
from tests.support import trained
from tests.support.kit import spawn

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDE = {"hidden_size": 64}  # heads of 16, which the fused operators take
GRAPHS = [
    ("llama", "cpu", "fp32", torch.float32, WIDE),
    ("llama", "cuda", "bf16", torch.bfloat16, WIDE),
    ("qwen3", "cuda", "bf16", torch.bfloat16, {}),
    ("qwen3_biases", "cuda", "fp16", torch.float32, {}),
    ("gemma2", "cuda", "fp16", torch.float16, {}),
    ("granite", "cuda", "bf16", torch.bfloat16, WIDE),
    ("gpt2", "portable", "fp16", torch.float16, {}),
    ("phi3_longrope_short", "portable", "fp32", torch.float32, {}),
    ("phi3_longrope_long", "portable", "fp32", torch.float32, {}),
    ("mistral_short_window", "cpu", "fp32", torch.bfloat16, WIDE),
    ("opt_350m", "portable", "fp32", torch.float32, {}),
    ("bert_sequence", "cpu", "fp32", torch.float32, {}),
    ("bert_sentence", "cpu", "fp32", torch.float32, {}),
    ("roberta_token", "portable", "fp32", torch.bfloat16, {}),
    ("distilbert_sequence", "cuda", "fp16", torch.float16, {}),
]


@pytest.mark.parametrize(
    ("name", "target", "dtype", "stored", "fields"), GRAPHS, ids=[f"{g[0]}-{g[1]}-{g[2]}" for g in GRAPHS]
)
def test_graphs_compute_what_their_models_are(
    name: str, target: str, dtype: str, stored: torch.dtype, fields: dict[str, int], tmp_path: Path
) -> None:
    base = recipes.build(name, tmp_path / "base", dtype=stored, **fields)
    export_onnx(base, output=tmp_path / "out", target=target, dtype=dtype)
    found = surgery.verify(tmp_path / "out", against=base)
    assert found.kind == "graph"
    assert found.difference is not None
    rounded = dtype != "fp32" and name in ("gemma2", "granite")  # they hold multipliers
    assert found.difference <= (1e-2 if rounded else TOLERANCE) * 20
    assert any("padded" in check.name for check in found.checks)
    assert not found.notes


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with as many keys as queries, and its graph with a copy of the weights."""
    root = tmp_path_factory.mktemp("exported")
    base = recipes.build("llama", root / "base", num_key_value_heads=4, **WIDE)
    export_onnx(base, output=root / "out")
    return base, root / "out"


@pytest.fixture
def out(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to be damaged; without a manifest, so that nothing but the graph's own proof can see it."""
    shutil.copytree(exported[1], tmp_path / "out")
    (tmp_path / "out" / "surgery_manifest.json").unlink()
    return tmp_path / "out"


def _edit(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    before = model.SerializeToString()
    change(model.graph)
    assert model.SerializeToString() != before
    path.write_bytes(model.SerializeToString())


def _initializer(graph: onnx.GraphProto, part: str) -> onnx.TensorProto:
    return next(one for one in graph.initializer if part in one.name and one.external_data)


def _swap(one: str, other: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        a, b = _initializer(graph, one), _initializer(graph, other)
        kept = list(a.external_data)
        places = [onnx.StringStringEntryProto(key=e.key, value=e.value) for e in kept]
        del a.external_data[:]
        a.external_data.extend(b.external_data)
        del b.external_data[:]
        b.external_data.extend(places)

    return change


def _attribute(op: str, name: str, factor: float) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == op)
        found = next(one for one in node.attribute if one.name == name)
        if found.type == onnx.AttributeProto.FLOAT:
            found.f *= factor
        else:
            found.i = int(found.i * factor)

    return change


def _constant(graph: onnx.GraphProto) -> None:
    """The slowest rotary frequency doubled."""
    import numpy as np

    tensor = next(one for one in graph.initializer if one.data_type == 1 and not one.external_data and one.dims)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[-1] *= 2
    tensor.raw_data = values.astype(np.float32).tobytes()


FAULTS = {
    "q and k exchanged": _swap("layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"),
    "two norms exchanged": _swap("layers.0.input_layernorm", "layers.0.post_attention_layernorm"),
    "a layer's matrix taken from another": _swap("layers.0.mlp.down_proj", "layers.2.mlp.down_proj"),
    "the scale of one layer 10 % off": _attribute("GroupQueryAttention", "scale", 1.1),
    "an epsilon a thousand times larger": _attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e3),
    "one rotary frequency doubled": _constant,
}


def test_the_undamaged_copy_passes(out: Path, exported: tuple[Path, Path]) -> None:
    assert surgery.verify(out, against=exported[0]).difference is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_computes_something_else(fault: str, out: Path) -> None:
    _edit(out, FAULTS[fault])
    with pytest.raises(ProofError, match="differs by"):
        surgery.verify(out)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("place", [-1, -3001, 2])
def test_a_flipped_byte_in_the_weight_file(place: int, out: Path, exported: tuple[Path, Path]) -> None:
    _flip(out / "model.safetensors", place)
    with pytest.raises(ProofError):
        surgery.verify(out, against=exported[0])


@pytest.mark.parametrize("place", [-1, -2000])
def test_a_flipped_byte_in_a_copy_whose_hash_was_noted(place: int, exported: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = exported
    out = tmp_path / "compared"
    export_onnx(base, output=out, verify_copies=True)
    assert not surgery.verify(out).notes
    data = bytearray((out / "model.safetensors").read_bytes())
    data[place] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(ProofError, match=r"model\.safetensors"):
        surgery.verify(out)


def test_weights_that_are_not_those_of_the_graph(out: Path) -> None:
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(ProofError, match="bytes"):
        surgery.verify(out)
    weights.write_bytes(whole.replace(b"self_attn.q_proj", b"self_attn.k_prok", 1))
    with pytest.raises(ProofError, match="header"):
        surgery.verify(out)
    weights.unlink()
    with pytest.raises(ProofError, match="missing"):
        surgery.verify(out)


def test_a_graph_that_reads_elsewhere(out: Path) -> None:
    def elsewhere(key: str, value: str) -> Callable[[onnx.GraphProto], None]:
        def change(graph: onnx.GraphProto) -> None:
            entry = next(e for e in _initializer(graph, "q_proj").external_data if e.key == key)
            entry.value = value

        return change

    _edit(out, elsewhere("offset", "99999999"))
    with pytest.raises(ProofError, match="beyond"):
        surgery.verify(out)
    _edit(out, elsewhere("location", "../secret"))
    with pytest.raises(ProofError, match="not in its contract"):
        surgery.verify(out)


def test_a_graph_with_the_weights_inside_needs_the_base(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    base = exported[0]
    export_onnx(base, output=tmp_path / "out", weights="embed")
    with pytest.raises(FitError, match="inside"):
        surgery.verify(tmp_path / "out")
    surgery.verify(tmp_path / "out", against=base)
    (tmp_path / "out" / "surgery_manifest.json").unlink()
    model = onnx.load(tmp_path / "out" / "model.onnx")
    tensor = next(one for one in model.graph.initializer if "layers.1.mlp.down_proj" in one.name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] = -values[3]
    tensor.raw_data = values.tobytes()
    (tmp_path / "out" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ProofError, match="differs by"):
        surgery.verify(tmp_path / "out", against=base)


def test_a_graph_over_a_merge_is_the_merge_of_base_and_adapter(tmp_path: Path) -> None:
    surgery.merge("examples/base", ("examples/lora", 0.7), output=tmp_path / "merged")
    export_onnx(tmp_path / "merged", output=tmp_path / "merged")
    merged = tmp_path / "merged"
    assert surgery.verify(merged).kind == "graph"
    surgery.verify(merged, against="examples/base", adapters=[("examples/lora", 0.7)])
    with pytest.raises(ProofError, match="differs by"):
        surgery.verify(merged, against="examples/base", adapters=[("examples/lora", 0.6)])
    with pytest.raises(ProofError, match="base's"):
        surgery.verify(merged, against="examples/base")


@pytest.fixture(scope="module")
def added_to(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a merge to which an export with an adapter for each place was added."""
    folder = tmp_path_factory.mktemp("added") / "merged"
    surgery.merge("examples/base", ("examples/lora", 0.5), output=folder)
    export_onnx(folder, output=folder, merge=["examples/dora"], swap=["examples/lora"], prefix=["examples/prompt"])
    return folder


def test_an_export_that_was_added_to_a_folder_of_weights(added_to: Path) -> None:
    names = [check.name for check in surgery.verify(added_to).checks]
    assert {"files", "computed tensors", "added files", "merged tensors"} <= set(names)


@pytest.mark.parametrize(
    "name",
    ["delta.safetensors", "adapters/lora.onnx_adapter", "prompts/prompt.onnx_adapter", "model.onnx", "rows.onnx"],
)
def test_a_flipped_byte_in_what_was_added(name: str, added_to: Path, tmp_path: Path) -> None:
    shutil.copytree(added_to, tmp_path / "out")
    path = tmp_path / "out" / name
    _flip(path, path.stat().st_size - 4097)
    with pytest.raises(ProofError, match="changed since it was written") as caught:
        surgery.verify(tmp_path / "out")
    assert caught.value.file == str(path)
    path.unlink()
    with pytest.raises(ProofError, match="missing"):
        surgery.verify(tmp_path / "out")


@pytest.mark.parametrize("files", [[], {"../base": {"size": 1}}, {"model.onnx": {"size": "x"}}, {"model.onnx": 5}])
def test_an_account_of_files_that_is_none(files: object, added_to: Path, tmp_path: Path) -> None:
    shutil.copytree(added_to, tmp_path / "out")
    (tmp_path / "out" / "surgery_export.json").write_text(json.dumps({"files": files}))
    with pytest.raises(MalformedError):
        surgery.verify(tmp_path / "out")


def test_a_prompt_that_is_no_number_in_a_later_layer_is_no_match() -> None:
    zeros = np.zeros((1, 2, 3, 4), np.float32)
    prompt = SimpleNamespace(prefix=SimpleNamespace(layers=2), key_values=lambda layer: (zeros[0], zeros[0]))
    whole, broken = torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3, 4), torch.nan)
    past: Any = SimpleNamespace(layers=[(whole, whole), (whole, broken)])
    adapter: Any = SimpleNamespace(prompt=prompt, path=Path("a"))
    found = compare_prompt(Path("model.onnx"), adapter, None, past, None)  # type: ignore[arg-type]
    assert not found.within(1.0)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize(("name", "target", "dtype"), [("llama", "cpu", "fp32"), ("gemma2", "cuda", "bf16")])
def test_a_soft_prompt_is_what_its_adapter_makes_of_the_model(
    kind: str, name: str, target: str, dtype: str, tmp_path: Path
) -> None:
    base = recipes.build(name, tmp_path / "base")
    prompt = trained.train(name, base, trained.PROMPTS[kind], tmp_path / "prompt")
    lora = trained.train(name, base, trained._lora(), tmp_path / "lora")
    export_onnx(base, merge=[lora], prefix=[prompt], output=tmp_path / "out", target=target, dtype=dtype)
    named = [(lora, 1.0), (prompt, 1.0)]
    checks = surgery.verify(tmp_path / "out", against=base, adapters=named).checks
    assert any(check.name == "soft prompt" for check in checks)
    other = trained.train(name, base, trained.PROMPTS[kind], tmp_path / "other", seed=5)
    with pytest.raises(ProofError, match="soft prompt"):
        surgery.verify(tmp_path / "out", against=base, adapters=[(lora, 1.0), (other, 1.0)])
    export_onnx(base, output=tmp_path / "plain")
    with pytest.raises(FitError, match="no soft prompt"):
        surgery.verify(tmp_path / "plain", against=base, adapters=[(prompt, 1.0)])


def test_only_outputs_of_surgery_are_verified(out: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        surgery.verify(tmp_path / "nothing")
    with pytest.raises(FitError, match="neither"):
        surgery.verify("examples/base")
    with pytest.raises(FitError, match="without a base"):
        surgery.verify(out, adapters=[("examples/lora", 1.0)])
    path = out / "model.onnx"
    whole = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    text = model.metadata_props[0].value
    for key, value in (("head_dim", '"x"'), ("layers", "-1"), ("adapters", "[3]"), ("padding", '"up"')):
        contract = json.loads(text)
        contract[key] = json.loads(value)
        model.metadata_props[0].value = json.dumps(contract)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(MalformedError, match="contract"):
            surgery.verify(out)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FitError, match="not written by surgery export-onnx"):
        surgery.verify(out)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MalformedError, match="ONNX"):
        surgery.verify(out)


def test_the_command_reports_the_checks_and_exits_with_5_on_a_fault(out: Path, exported: tuple[Path, Path]) -> None:
    run = CliRunner().invoke(command, ["--json", "verify", str(out), "--against", str(exported[0])])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)["result"]
    assert told["difference"] <= TOLERANCE * 20
    assert {"name", "detail", "difference", "limit"} <= set(told["checks"][-1])
    _edit(out, FAULTS["q and k exchanged"])
    done = spawn("verify", out)
    assert done.returncode == 5
    assert "a logit differs by" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FitError, match="a file, not the folder of an output"):
        surgery.verify(tmp_path / "model.safetensors")
