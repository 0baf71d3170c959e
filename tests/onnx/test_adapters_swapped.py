# SPDX-License-Identifier: Apache-2.0
"""Adapters in the slots of a graph: without one it is the base, with one it computes what PEFT computes."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime
import pytest

from surgery import combine
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.run import run
from surgery.verbs.verify import verify
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
THREE = {
    "all": trained._lora(),
    "qv": trained._lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "rs": trained._lora(use_rslora=True, r=6),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", hidden_size=64)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: trained.train("llama", base, config, folder / name, seed)
        for seed, (name, config) in enumerate(THREE.items())
    }


def swapped(plain, *files):
    """Logits with adapters active, the way onnxruntime itself does it: nothing of ours."""
    options = onnxruntime.RunOptions()
    loaded = []
    for file in files:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(file))
        options.add_active_adapter(loaded[-1])
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    return plain.session.run(["logits"], feed, options)[0]


@pytest.mark.parametrize("target", ["cuda", "cpu", "portable"])
def test_three_adapters_can_be_swapped_within_a_session(base, adapters, target, tmp_path):
    out = tmp_path / "out"
    result = export_onnx(base, swap=list(adapters.values()), output=out, target=target, dtype="fp32")
    plain = Plain(out / "model.onnx")
    expected = trained.logits(recipes.load("llama", base), IDS)
    for name, path in adapters.items():
        alone = trained.logits(trained.attached("llama", base, (path, 1.0)), IDS)
        assert np.abs(alone - expected).max() > 0.05
        assert np.abs(swapped(plain, out / "adapters" / f"{name}.onnx_adapter") - alone).max() <= TOLERANCE
        assert np.abs(swapped(plain) - expected).max() <= 1e-5  # and the base again
    assert [(one["name"], one["mode"]) for one in result.contract.adapters] == [(name, "swapped") for name in THREE]
    assert len(result.contract.slots) == 7 * 3  # the union of the targets


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_the_runner_adds_up_several_adapters(base, adapters, target, tmp_path):
    export_onnx(base, swap=list(adapters.values()), output=tmp_path / "out", target=target)
    files = [tmp_path / "out" / "adapters" / f"{name}.onnx_adapter" for name in THREE]
    for chosen in ([], [0], [1, 2], [0, 1, 2]):
        model = recipes.load("llama", base)
        if chosen:
            model = trained.attached("llama", base, *((adapters[list(THREE)[i]], 1.0) for i in chosen))
        found = run(tmp_path / "out", [IDS[0].tolist()], max_new=8, adapters=[files[i] for i in chosen])
        assert list(found.texts[0].tokens) == trained.generated(model, IDS, 8)


CASES = {
    "gpt2": ["c_attn", "c_proj"],  # stored transposed, q k v in one
    "gpt_neox": ["query_key_value", "dense"],  # q k v head by head
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gemma2": ["q_proj", "embed_tokens"],  # a scaled table
    "opt": ["fc1", "q_proj"],
}


@pytest.mark.parametrize("name", CASES)
def test_fused_transposed_and_embedding_weights_have_slots(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    adapter = trained.train(name, base, trained._lora(target_modules=CASES[name]), tmp_path / "adapter")
    export_onnx(base, swap=[adapter], output=tmp_path / "out")
    plain = Plain(tmp_path / "out" / "model.onnx")
    expected = trained.logits(trained.attached(name, base, (adapter, 1.0)), IDS)
    assert np.abs(swapped(plain, tmp_path / "out" / "adapters" / "adapter.onnx_adapter") - expected).max() <= TOLERANCE
    assert np.abs(swapped(plain) - trained.logits(recipes.load(name, base), IDS)).max() <= 1e-5


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_a_tied_head_has_its_own_slot(modules, tmp_path):
    base = recipes.build("qwen2", tmp_path / "base", tie_word_embeddings=True)
    adapter = trained.train("qwen2", base, trained._lora(target_modules=modules), tmp_path / "adapter")
    export_onnx(base, swap=[adapter], output=tmp_path / "out")
    plain = Plain(tmp_path / "out" / "model.onnx")
    expected = trained.logits(trained.attached("qwen2", base, (adapter, 1.0)), IDS)
    assert np.abs(swapped(plain, tmp_path / "out" / "adapters" / "adapter.onnx_adapter") - expected).max() <= TOLERANCE


def test_one_adapter_can_be_merged_and_another_swapped(base, adapters, tmp_path):
    export_onnx(base, merge=[adapters["all"]], swap=[adapters["qv"]], output=tmp_path / "out")
    plain = Plain(tmp_path / "out" / "model.onnx")
    both = trained.logits(trained.attached("llama", base, (adapters["all"], 1.0), (adapters["qv"], 1.0)), IDS)
    one = trained.logits(trained.attached("llama", base, (adapters["all"], 1.0)), IDS)
    assert np.abs(swapped(plain, tmp_path / "out" / "adapters" / "qv.onnx_adapter") - both).max() <= TOLERANCE
    assert np.abs(swapped(plain) - one).max() <= TOLERANCE


def test_the_scale_is_folded_into_B_in_the_type_of_the_graph(base, adapters, tmp_path):
    export_onnx(base, swap=[adapters["rs"]], output=tmp_path / "out", target="portable", dtype="fp16")
    arrays = read_adapter_file(tmp_path / "out" / "adapters" / "rs.onnx_adapter")
    assert {array.dtype.name for array in arrays.values()} == {"float16"}
    from safetensors.numpy import load_file

    stored = load_file(adapters["rs"] / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    scaled = stored[f"base_model.model.{name}.lora_B.weight"].T * np.float32(6 / 6**0.5)
    assert np.array_equal(arrays[f"{name}.lora_B.weight"], scaled.astype(np.float16))
    A = stored[f"base_model.model.{name}.lora_A.weight"].T
    assert np.array_equal(arrays[f"{name}.lora_A.weight"], A.astype(np.float16))


def test_vera_is_swapped_as_the_lora_that_it_is_on_this_base(base, tmp_path):
    adapter = trained.train("llama", base, trained.MERGED["vera"], tmp_path / "adapter")
    export_onnx(base, swap=[adapter], output=tmp_path / "out")
    expected = trained.logits(trained.attached("llama", base, (adapter, 1.0)), IDS)
    found = swapped(Plain(tmp_path / "out" / "model.onnx"), tmp_path / "out" / "adapters" / "adapter.onnx_adapter")
    assert np.abs(trained.logits(recipes.load("llama", base), IDS) - expected).max() > 0.01
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["dora", "modules_to_save head", "trainable tokens", "oft", "loha", "ia3"],
)
def test_what_a_slot_cannot_hold_is_refused_by_name(base, name, tmp_path):
    adapter = trained.train("llama", base, trained.MERGED[name], tmp_path / "adapter")
    with pytest.raises(FitError) as caught:
        export_onnx(base, swap=[adapter], output=tmp_path / "out")
    assert "merge" in caught.value.hint
    assert caught.value.tensor
    assert not (tmp_path / "out").exists()


def test_a_soft_prompt_goes_into_no_slot(base, tmp_path):
    adapter = trained.train("llama", base, trained.PROMPTS["prompt"], tmp_path / "adapter")
    with pytest.raises(FitError, match="goes into no slot") as caught:
        export_onnx(base, swap=[adapter], output=tmp_path / "out")
    assert "`prefix=`" in caught.value.hint


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_required_slots_are_inputs_that_every_runtime_passes(base, adapters, target, tmp_path):
    """onnxruntime-node 1.30 passes the inputs without a default, and drops all others without a word."""
    for name, required in (("optional", False), ("required", True)):
        result = export_onnx(base, swap=adapters["qv"], output=tmp_path / name, target=target, required=required)
    assert any("with an adapter only" in text for text in result.warnings)
    session = onnxruntime.InferenceSession(tmp_path / "required" / "model.onnx", providers=["CPUExecutionProvider"])
    passed = {one.name for one in session.get_inputs()}
    assert {name for slot in result.contract.slots for name in (slot.A, slot.B)} <= passed
    verify(tmp_path / "required")  # raises where a logit differs
    file = tmp_path / "required" / "adapters" / "qv.onnx_adapter"
    for chosen in ([], [file]):
        ours, others = (
            run(tmp_path / name, [IDS[0].tolist(), [5, 9]], max_new=6, adapters=chosen).texts
            for name in ("required", "optional")
        )
        assert ours == others


def test_slots_that_are_not_there_or_hold_the_bases_values_cannot_be_required(base, adapters, tmp_path):
    with pytest.raises(FitError, match="no slots to require"):
        export_onnx(base, adapters["qv"], output=tmp_path / "out", required=True)


@pytest.mark.parametrize("required", [False, True])
def test_the_adapter_that_does_nothing_switches_slots_off(base, adapters, required, tmp_path):
    export_onnx(base, swap=[adapters["qv"]], output=tmp_path / "out", required=required)
    expected = trained.logits(recipes.load("llama", base), IDS)
    plain = Plain(tmp_path / "out" / "model.onnx")
    nothing = tmp_path / "out" / "none.onnx_adapter"
    if required:  # onnxruntime's Python checks inputs before it looks at adapters
        plain.past = {**plain.past, **read_adapter_file(nothing)}
    found = swapped(plain, *([] if required else [nothing]))
    assert np.abs(found - expected).max() <= TOLERANCE
    none = run(tmp_path / "out", IDS.tolist(), max_new=3, adapters=tmp_path / "out" / "none.onnx_adapter")
    assert none.texts[0].tokens == run(tmp_path / "out", IDS.tolist(), max_new=3).texts[0].tokens


def test_onnxruntime_takes_the_first_of_two_adapters_and_run_adds_them(base, adapters, tmp_path):
    """Why `run` and docs/deploying.md do not leave it to onnxruntime; `combine` makes one adapter of two."""
    out = tmp_path / "out"
    export_onnx(base, swap=[adapters["all"], adapters["rs"]], output=out)
    plain = Plain(out / "model.onnx")
    files = [out / "adapters" / f"{name}.onnx_adapter" for name in ("all", "rs")]
    both = swapped(plain, *files)
    assert np.array_equal(both, swapped(plain, files[0]))
    combined = combine([adapters["all"], adapters["rs"]], output=tmp_path / "one")
    export_onnx(base, swap=[combined.output], output=tmp_path / "combined")
    added = swapped(
        Plain(tmp_path / "combined" / "model.onnx"), tmp_path / "combined" / "adapters" / "one.onnx_adapter"
    )
    attached = trained.logits(trained.attached("llama", base, (adapters["all"], 1.0), (adapters["rs"], 1.0)), IDS)
    assert np.abs(added - attached).max() <= TOLERANCE
    assert np.abs(added - both).max() > 0.01


def test_a_weight_is_what_the_slots_hold(base, adapters, tmp_path):
    export_onnx(base, swap=[(adapters["all"], 0.5)], output=tmp_path / "out")
    attached = trained.logits(trained.attached("llama", base, (adapters["all"], 0.5)), IDS)
    found = swapped(Plain(tmp_path / "out" / "model.onnx"), tmp_path / "out" / "adapters" / "all.onnx_adapter")
    assert np.abs(found - attached).max() <= TOLERANCE


def test_a_swapped_adapter_keeps_its_own_template(tmp_path):
    folders = {name: tmp_path / name for name in ("base", "chat", "plain")}
    shutil.copytree("examples/base", folders["base"])
    for name in ("chat", "plain"):
        shutil.copytree("examples/lora", folders[name])
        shutil.copy("examples/base/tokenizer.json", folders[name])
    (folders["base"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folders["chat"] / "chat_template.jinja").write_text("def {{ messages[0].content }}(")
    out = tmp_path / "out"
    result = export_onnx(folders["base"], swap=[folders["chat"], folders["plain"]], output=out)
    assert [entry.get("tokenizer") for entry in result.contract.adapters] == ["tokenizer-chat", None]
    assert (out / "tokenizer-chat" / "chat_template.jinja").read_text().startswith("def ")
    assert (out / "chat_template.jinja").read_bytes() == (folders["base"] / "chat_template.jinja").read_bytes()
    asked = [run(out, "main", max_new=1, chat=True, adapters=a).texts[0].prompt for a in ([], _files(out, "chat"))]
    asked += [run(out, "main", max_new=1, chat=True, adapters=_files(out, "plain")).texts[0].prompt]
    assert asked[0] == asked[2]
    assert len(asked[1]) > len(asked[0])
    export_onnx(folders["base"], swap=folders["chat"], output=tmp_path / "triton", layout="triton")
    for folder in (out, tmp_path / "triton"):  # whose graph lies in 1/
        named, filed = (run(folder, "main", max_new=4, chat=True, adapters=a) for a in ("chat", _files(folder, "chat")))
        assert named.texts == filed.texts
        assert named.texts[0].prompt == asked[1]


def _files(out, name):
    return [out / "adapters" / f"{name}.onnx_adapter"]
