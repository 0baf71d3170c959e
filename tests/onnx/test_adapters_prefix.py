# SPDX-License-Identifier: Apache-2.0
"""Soft prompts as keys and values, as rows, and in front of an encoder give the logits of PEFT."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.run import run
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.kit import ROOT
from tests.support.sessions import Plain, open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
SHORT = np.array([[29, 8, 77, 50]])
TOLERANCE = 1e-4
STEPS = 8
MODELS = {
    "llama": {"hidden_size": 64, "num_key_value_heads": 2},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {},
}


class Case:
    """A base, its soft prompts, and what PEFT makes of them."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.base = recipes.build(name, folder / "base", **MODELS[name])

    @functools.cache  # noqa: B019
    def adapter(self, kind):
        return trained.train(self.name, self.base, trained.PROMPTS[kind], self.folder / kind)

    @functools.cache  # noqa: B019
    def model(self, kind):
        return trained.attached(self.name, self.base, (self.adapter(kind), 1.0))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


class Unaware(Plain):
    """A caller who knows nothing of virtual tokens: no past at first, a mask over its own tokens."""

    def __init__(self, path, adapter=None):
        super().__init__(path)
        self.past = {}
        self.options = onnxruntime.RunOptions()
        if adapter is not None:
            self.adapter = onnxruntime.LoraAdapter()
            self.adapter.Load(str(adapter))
            self.options.add_active_adapter(self.adapter)

    def step(self, ids, mask):
        feed = {"input_ids": ids, "attention_mask": mask, **self.past}
        names = [one.name for one in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, feed, self.options), strict=True))
        self.options = onnxruntime.RunOptions()
        present = {name: array for name, array in found.items() if name.startswith("present.")}
        self.past = {name.replace("present.", "past_key_values."): array for name, array in present.items()}
        return found["logits"]


def assert_like(graph, model, ids=IDS):
    """Prefill, decode steps and greedy tokens."""
    tokens = trained.generated(model, ids, STEPS)
    whole = np.concatenate([ids, [tokens]], 1)
    expected = trained.logits(model, whole)
    found = graph.step(ids, np.ones_like(ids))
    assert np.abs(found[0] - expected[0, : ids.shape[1]]).max() <= TOLERANCE
    chosen = [int(found[0, -1].argmax())]
    for at in range(ids.shape[1], whole.shape[1] - 1):
        found = graph.step(whole[:, at : at + 1], np.ones((1, at + 1), np.int64))
        assert np.abs(found[0, 0] - expected[0, at]).max() <= TOLERANCE
        chosen.append(int(found[0, -1].argmax()))
    assert chosen == tokens


@pytest.mark.parametrize("target", ["cuda", "cpu", "portable"])
@pytest.mark.parametrize("kind", trained.PROMPTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_default_past_gives_the_logits_of_peft(case, name, kind, target, tmp_path):
    one = case(name)
    result = export_onnx(one.base, [one.adapter(kind)], output=tmp_path / "out", target=target, dtype="fp32")
    assert (result.contract.virtual_tokens, result.contract.prompt_kind) == (
        trained.TOKENS,
        {"prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING"}.get(kind, "PREFIX_TUNING"),
    )
    model = one.model(kind)
    plain = trained.logits(recipes.load(name, one.base), IDS)
    assert np.abs(trained.logits(model, IDS) - plain).max() > 0.01
    assert_like(Unaware(tmp_path / "out" / "model.onnx"), model)
    rows = (tmp_path / "out" / "rows.onnx").exists()  # what onnxruntime-genai gets
    assert rows == (tmp_path / "out" / "genai_config.json").exists() == (not kind.startswith("prefix"))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_learned_positions_continue_after_the_prompt(case, kind, tmp_path):
    one = case("gpt2")
    export_onnx(one.base, [one.adapter(kind)], output=tmp_path / "out")
    assert_like(Unaware(tmp_path / "out" / "model.onnx"), one.model(kind))


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_prompts_can_be_swapped_within_a_session(case, target, tmp_path):
    one = case("llama")
    prompts = {kind: one.adapter(kind) for kind in trained.PROMPTS}
    result = export_onnx(one.base, prefix=list(prompts.values()), output=tmp_path / "out", target=target)
    for entry, kind in zip(result.contract.adapters, prompts, strict=True):
        assert_like(Unaware(tmp_path / "out" / "model.onnx", tmp_path / "out" / entry["file"]), one.model(kind))
    base = Unaware(tmp_path / "out" / "model.onnx")  # an empty past is the base
    size = (1, result.contract.kv_heads, 0, result.contract.head_dim)
    base.past = {
        one.name: np.zeros(size, "f4") for one in base.session.get_overridable_initializers() if "past" in one.name
    }
    expected = trained.logits(recipes.load("llama", one.base), IDS)
    assert np.abs(base.step(IDS, np.ones_like(IDS)) - expected).max() <= 1e-5


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_runner_generates_what_peft_generates(case, kind, target, tmp_path):
    """With a shared buffer (cpu) the runner writes the prefix itself; rows of different lengths stay independent."""
    one = case("llama")
    other = {"prompt": "prefix", "prefix": "prompt"}[kind]
    out = tmp_path / "out"
    export_onnx(one.base, prefix=[one.adapter(kind), one.adapter(other)], output=out, target=target)
    rows = [IDS[0].tolist(), SHORT[0].tolist()]
    found = run(out, rows, max_new=STEPS)
    assert found.virtual_tokens == trained.TOKENS
    for text, ids in zip(found.texts, (IDS, SHORT), strict=True):
        assert list(text.tokens) == trained.generated(one.model(kind), ids, STEPS)
    found = run(out, rows[:1], max_new=STEPS, prompt_adapter=out / "prompts" / f"{other}.onnx_adapter")
    assert list(found.texts[0].tokens) == trained.generated(one.model(other), IDS, STEPS)
    found = run(out, rows[:1], max_new=STEPS, prompt=False)
    assert list(found.texts[0].tokens) == trained.generated(recipes.load("llama", one.base), IDS, STEPS)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_shared_buffer_is_never_mistaken_for_uncounted_tokens(case, tokens, tmp_path):
    """Buffers of any size against prompts of any length: the lengths alone could not tell them apart."""
    one = case("llama")
    adapter = trained.train("llama", one.base, ("PrefixTuningConfig", {"num_virtual_tokens": tokens}), tmp_path / "a")
    export_onnx(one.base, [adapter], output=tmp_path / "out")
    model = trained.attached("llama", one.base, (adapter, 1.0))
    for steps in (1, 2, 9):
        found = run(tmp_path / "out", [IDS[0].tolist()], max_new=steps)
        assert list(found.texts[0].tokens) == trained.generated(model, IDS, steps)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "granite"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_rows_after_the_vocabulary_give_the_logits_of_peft(name, target, tmp_path):
    """Families whose table scales its rows, and one that scales whatever comes, too."""
    base = recipes.build(name, tmp_path / "base", **MODELS.get(name, {}))
    adapter = trained.train(name, base, trained.PROMPTS["prompt"], tmp_path / "adapter")
    result = export_onnx(base, [adapter], output=tmp_path / "out", prompt_form="rows", target=target)
    assert result.contract.vocabulary_rows == (recipes.VOCAB, trained.TOKENS)
    assert result.contract.virtual_tokens == 0
    model = trained.attached(name, base, (adapter, 1.0))
    ahead = np.arange(recipes.VOCAB, recipes.VOCAB + trained.TOKENS)[None]
    ids = np.concatenate([ahead, IDS], 1)
    graph = Plain(tmp_path / "out" / "model.onnx")
    found = graph.step(ids, np.ones_like(ids))
    tokens = torch.from_numpy(IDS)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()
    assert found.shape == expected.shape  # virtual positions too, and no wider vocabulary
    assert np.abs(found - expected).max() <= TOLERANCE
    generated = run(tmp_path / "out", [IDS[0].tolist()], max_new=STEPS)
    assert list(generated.texts[0].tokens) == trained.generated(model, IDS, STEPS)
    assert generated.virtual_tokens == trained.TOKENS
    assert (tmp_path / "out" / "genai_config.json").exists()


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_keys_and_values_follow_the_scale_of_embeddings(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    adapter = trained.train(name, base, trained.PROMPTS["prompt"], tmp_path / "adapter")
    export_onnx(base, [adapter], output=tmp_path / "out")
    assert_like(Unaware(tmp_path / "out" / "model.onnx"), trained.attached(name, base, (adapter, 1.0)))


@pytest.mark.parametrize("own_folder", [False, True])
def test_a_prompt_is_computed_with_the_merged_weights(case, own_folder, tmp_path):
    base = recipes.build("llama", tmp_path / "base", **MODELS["llama"])
    lora = trained.train("llama", base, trained._lora(), tmp_path / "lora")
    prompt = trained.train("llama", base, trained.PROMPTS["prompt"], tmp_path / "prompt")
    out = base if own_folder else tmp_path / "out"
    result = export_onnx(base, [lora, prompt], output=out)
    assert [one["mode"] for one in result.contract.adapters] == ["merged", "prefix"]
    merged = trained.attached("llama", base, (lora, 1.0)).merge_and_unload()
    import peft

    assert_like(Unaware(out / "model.onnx"), peft.PeftModel.from_pretrained(merged, prompt).eval())
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_several_rows_on_the_prompt_go_through_the_prefill_graph(case, tmp_path):
    one = case("llama")
    export_onnx(one.base, [one.adapter("prompt")], output=tmp_path / "out")
    session, _ = open_session(tmp_path / "out" / "prefill.onnx")
    past = read_adapter_file(tmp_path / "out" / "prompts" / "prompt.onnx_adapter")
    tiled = {name: np.repeat(array, 2, 0) for name, array in past.items()}
    ids = np.concatenate([IDS, IDS[:, ::-1]])
    found = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **tiled})[0]
    for row in (0, 1):
        expected = trained.logits(one.model("prompt"), ids[row : row + 1])
        assert np.abs(found[row] - expected[0]).max() <= TOLERANCE


def test_half_precision_keys_have_the_type_of_the_cache(case, tmp_path):
    one = case("llama")
    export_onnx(one.base, [one.adapter("prompt")], output=tmp_path / "out", target="portable", dtype="fp16")
    past = read_adapter_file(tmp_path / "out" / "prompts" / "prompt.onnx_adapter")
    assert {array.dtype.name for array in past.values()} == {"float16"}
    found = Unaware(tmp_path / "out" / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - trained.logits(one.model("prompt"), IDS)).max() <= 2e-2


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_a_text_is_read_once(target, tmp_path):
    """Generated text continues the baked text and the input, which has no beginning token of its own."""
    import transformers

    base = ROOT / "examples" / "base"
    text, goes_on = "The function returns", [" the value", " no"]
    result = export_onnx(base, bake_prompt=[text], output=tmp_path / "out", target=target, dtype="fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    head = tokenizer(text).input_ids
    assert (result.contract.prompt_kind, result.contract.virtual_tokens) == ("TEXT", len(head))
    assert result.contract.adapters[0]["ids"] == head
    found = run(tmp_path / "out", goes_on, max_new=STEPS)
    for one, more in zip(found.texts, goes_on, strict=True):
        ids = np.array([head + tokenizer(more, add_special_tokens=False).input_ids])
        expected = trained.generated(model, ids, STEPS)
        assert list(one.tokens) == expected[: len(one.tokens)]
        assert one.reason == "stop" or len(one.tokens) == STEPS
    assert not (tmp_path / "out" / "genai_config.json").exists()


ENCODERS = {
    "bert_sequence": "SEQ_CLS",
    "bert_token": "TOKEN_CLS",
    "roberta_sequence": "SEQ_CLS",
    "distilbert_sequence": "SEQ_CLS",
}


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_prompt_tuned_classifier_gives_the_logits_of_peft(name, kind, target, tmp_path):
    """Virtual tokens inside the graph, a classifier trained beside them merged, padding as in the contract."""
    base = recipes.build(name, tmp_path / "base")
    config, fields = trained.PROMPTS[kind]
    if name.startswith("distilbert"):  # PEFT does not find these in its config
        fields = {**fields, "token_dim": 32, "num_layers": 3, "num_attention_heads": 4}
    adapter = trained.train(name, base, (config, fields), tmp_path / "adapter", task=ENCODERS[name])
    result = export_onnx(base, [adapter], output=tmp_path / "out", target=target)
    assert result.contract.virtual_tokens == trained.TOKENS
    assert result.ledger is not None  # of the classifier
    model = trained.attached(name, base, (adapter, 1.0))
    session, contract = open_session(tmp_path / "out" / "model.onnx")
    ids, mask = np.tile(IDS, (2, 1)), np.ones((2, IDS.shape[1]), np.int64)
    ids[1], mask[1] = 1, 0
    ids[1, : SHORT.shape[1]], mask[1, : SHORT.shape[1]] = SHORT, 1
    feed = {"input_ids": ids, "attention_mask": mask}
    if any(one.name == "token_type_ids" for one in session.get_inputs()):
        feed["token_type_ids"] = np.arange(ids.size).reshape(ids.shape) % 2
    found = session.run(["logits"], feed)[0]
    inputs = {key: torch.from_numpy(value) for key, value in feed.items()}
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    if ENCODERS[name] == "TOKEN_CLS":
        expected = expected[:, trained.TOKENS :]
        assert np.abs(found - expected)[mask.astype(bool)].max() <= TOLERANCE
    assert found.shape == expected.shape
    if ENCODERS[name] == "SEQ_CLS":
        assert np.abs(found - expected).max() <= TOLERANCE
    assert contract.padding == "right"
    assert len(surgery.verify(tmp_path / "out").checks) >= 3


REFUSED = {
    "rows of keys and values": ("prefix", {"prompt_form": "rows"}, "are not tokens"),
    "no room": ("prompt", {"max_length": 5}, "leave no room"),
    "no such form": ("prompt", {"prompt_form": "other"}, "not a form"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_impossible_options_are_refused_and_nothing_is_written(case, why, tmp_path):
    kind, options, words = REFUSED[why]
    one = case("llama")
    with pytest.raises(FitError, match=words):
        export_onnx(one.base, [one.adapter(kind)], output=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_prompt_for_another_model_is_refused(case, kind, tmp_path):
    with pytest.raises(FitError, match="the model"):
        export_onnx(case("qwen2").base, [case("llama").adapter(kind)], output=tmp_path / "out")
