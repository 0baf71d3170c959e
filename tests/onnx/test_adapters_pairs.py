# SPDX-License-Identifier: Apache-2.0
"""Adapters of encoder-decoders, merged and in slots: every graph computes what PEFT's attached adapter computes."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from surgery.onnx.graph.pair_names import BEGUN, ENCODER, FIRST, MERGED
from surgery_formats.errors import FitError, NotFoundError
from tests.oracles import recipes
from tests.support import trained

IDS = np.array([[5, 17, 3, 88, 42], [29, 8, 77, 1, 1]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
STARTS = np.array([[2, 5, 9, 33], [2, 8, 4, 11]])
SOUND = np.random.default_rng(3).normal(size=(2, 5, 24)).astype(np.float32)

TASKS = {"t5_flan": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "whisper": None}  # PEFT's task passes no spectrograms
QUERIES = {"t5_flan": ["q", "v"], "bart": ["q_proj", "v_proj"], "whisper": ["q_proj", "v_proj"]}
EVERY = {
    "t5_flan": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "whisper": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def _lora(targets):
    return "LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": targets}


def _ia3(names):
    down = names[-1]
    return "IA3Config", {"target_modules": [names[1], names[2], down], "feedforward_modules": [down]}


def source_of(name):
    return {"input_features": SOUND} if name == "whisper" else {"input_ids": IDS, "attention_mask": MASK}


def expected_of(model, name):
    inputs = {key: torch.from_numpy(value) for key, value in source_of(name).items()}
    with torch.no_grad():
        return model(**inputs, decoder_input_ids=torch.from_numpy(STARTS)).logits.numpy()


class Plain:
    """All graphs of a folder in onnxruntime itself."""

    def __init__(self, folder):
        self.folder, options = folder, onnxruntime.SessionOptions()
        options.log_severity_level = 3  # of inputs with a default
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            for name in (ENCODER, FIRST, BEGUN, MERGED)
        }

    def run(self, graph, feed, adapter):
        options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        if adapter and (self.folder / adapter).exists():
            loaded.Load(str(self.folder / adapter))
            options.add_active_adapter(loaded)
        names = [one.name for one in self.sessions[graph].get_outputs()]
        return dict(zip(names, self.sessions[graph].run(names, feed, options), strict=True))

    def logits(self, name, adapter=""):
        """Of the starts, the last of them read in a second run: by the two graphs, and by the two branches of one."""
        own, theirs = (f"adapters/{adapter}{part}.onnx_adapter" if adapter else "" for part in ("", ".encoder"))
        source = source_of(name)
        mask = {"encoder_attention_mask": MASK} if "attention_mask" in source else {}
        states = {"encoder_hidden_states": self.run(ENCODER, source, theirs)["last_hidden_state"]}
        found = []
        for first, begun, switches in ((FIRST, BEGUN, False), (MERGED, MERGED, True)):
            feed = {**mask, **states, "input_ids": STARTS[:, :3]}
            if switches:
                ports = [one for one in self.sessions[MERGED].get_inputs() if one.name.startswith("past")]
                feed |= {port.name: np.zeros((2, 1, 0, 1), np.float32) for port in ports}
                feed["use_cache_branch"] = np.array([False])
            outputs = self.run(first, feed, own)
            kept = {
                key.replace("present", "past_key_values"): value for key, value in outputs.items() if key != "logits"
            }
            after = {**mask, **kept, "input_ids": STARTS[:, 3:]}
            after |= {**states, "use_cache_branch": np.array([True])} if switches else {}
            found.append(np.concatenate([outputs["logits"], self.run(begun, after, own)["logits"]], 1))
        return found


@pytest.fixture(scope="module", params=QUERIES)
def base(request, tmp_path_factory):
    return request.param, recipes.build(request.param, tmp_path_factory.mktemp(request.param) / "base")


def test_slots_are_the_base_and_the_adapter(base, tmp_path):
    name, folder = base
    adapter = trained.train(name, folder, _lora(EVERY[name]), tmp_path / "every", task=TASKS[name])
    surgery.export_onnx(folder, swap=adapter, output=tmp_path / "out")
    plain = Plain(tmp_path / "out")
    alone, wanted = (
        expected_of(recipes.load(name, folder), name),
        expected_of(trained.attached(name, folder, (adapter, 1.0)), name),
    )
    assert np.abs(alone - wanted).max() > 0.1
    for found in plain.logits(name):
        assert np.abs(found - alone).max() <= 1e-4
    for found in plain.logits(name, "every"):
        assert np.abs(found - wanted).max() <= 1e-4
    states = [
        plain.run(ENCODER, source_of(name), file)["last_hidden_state"] for file in ("none.encoder.onnx_adapter", "")
    ]
    assert np.array_equal(*states)
    surgery.verify(tmp_path / "out")


@pytest.mark.parametrize("kind", ["queries", "every", "ia3"])
def test_merged_adapters_are_the_attached_ones(base, kind, tmp_path):
    name, folder = base
    config = {"queries": _lora(QUERIES[name]), "every": _lora(EVERY[name]), "ia3": _ia3(EVERY[name])}[kind]
    adapter = trained.train(name, folder, config, tmp_path / kind, task=TASKS[name])
    surgery.export_onnx(folder, adapter, output=tmp_path / "out")
    wanted = expected_of(trained.attached(name, folder, (adapter, 1.0)), name)
    for found in Plain(tmp_path / "out").logits(name):
        assert np.abs(found - wanted).max() <= 1e-4
    surgery.verify(tmp_path / "out", against=folder, adapters=adapter)


def test_run_gives_each_graph_its_part_of_an_adapter(tmp_path):
    folder = recipes.build("t5_flan", tmp_path / "base")
    adapter = trained.train("t5_flan", folder, _lora(["q", "v"]), tmp_path / "style", task="SEQ_2_SEQ_LM")
    out = tmp_path / "out"
    surgery.export_onnx(folder, swap=adapter, output=out)
    rows = [IDS[0].tolist(), IDS[1, :3].tolist()]
    model = trained.attached("t5_flan", folder, (adapter, 1.0))
    tokens, mask = torch.from_numpy(np.where(MASK, IDS, 0)), torch.from_numpy(MASK)
    with torch.no_grad():
        wanted = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    found = surgery.run(out, rows, max_new=8, adapters=out / "adapters" / "style.onnx_adapter")
    for text, row in zip(found.texts, wanted[:, 1:].tolist(), strict=True):
        assert list(text.tokens) == row[: row.index(1) if 1 in row else None]
    alone, file = surgery.run(out, rows, max_new=8), out / "adapters" / "style.onnx_adapter"
    assert found.texts != alone.texts
    assert surgery.run(out, rows, max_new=8, adapters=f"{file}=0").texts == alone.texts
    assert surgery.run(out, rows, max_new=8, adapters="style").texts == found.texts
    assert surgery.run(out, rows, max_new=8, adapters="style=0").texts == alone.texts
    assert surgery.run(out, rows, max_new=8, adapters=out / "none.onnx_adapter").texts == alone.texts
    beside = file.with_name("style.encoder.onnx_adapter")
    assert surgery.run(out, rows, max_new=8, adapters=[file, beside]).texts == found.texts
    elsewhere = shutil.copytree(out / "adapters", tmp_path / "copies")
    assert surgery.run(out, rows, max_new=8, adapters=elsewhere / "style.onnx_adapter").texts == found.texts
    (elsewhere / "style.onnx_adapter").rename(elsewhere / "terse.onnx_adapter")
    (elsewhere / "style.encoder.onnx_adapter").rename(elsewhere / "terse.encoder.onnx_adapter")
    assert surgery.run(out, rows, max_new=8, adapters=elsewhere / "terse.onnx_adapter").texts == found.texts
    (tmp_path / "alone").mkdir()
    half = shutil.copy(file, tmp_path / "alone")
    with pytest.raises(NotFoundError, match="part for the encoder"):
        surgery.run(out, rows, max_new=8, adapters=half)


def test_what_no_graph_of_a_pair_takes_is_refused(tmp_path):
    folder = recipes.build("bart", tmp_path / "base")
    prompt = (
        "PromptTuningConfig",
        {"num_virtual_tokens": 3, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4},
    )
    adapter = trained.train("bart", folder, prompt, tmp_path / "prompt", task="SEQ_2_SEQ_LM")
    with pytest.raises(FitError, match="an encoder and its decoder"):
        surgery.export_onnx(folder, prefix=adapter, output=tmp_path / "out")
    with pytest.raises(FitError, match="no cache of its own text"):
        surgery.export_onnx(folder, bake_prompt="text", output=tmp_path / "out")
    with pytest.raises(FitError, match="counts its positions itself"):
        surgery.export_onnx(folder, position_ids=True, output=tmp_path / "out")
    surgery.export_onnx(folder, output=tmp_path / "out")
    with pytest.raises(FitError, match="not timed"):
        surgery.bench(tmp_path / "out")


@pytest.mark.parametrize("target", ["shared", "lm_head"])
def test_a_merge_that_parts_head_and_embedding_is_refused(target, tmp_path):
    """transformers 5 would load the result without the embeddings of encoder and decoder."""
    folder = recipes.build("marian", tmp_path / "base")
    adapter = trained.train("marian", folder, _lora(["q_proj", target]), tmp_path / "lora", task="SEQ_2_SEQ_LM")
    with pytest.raises(FitError, match="by the same switch as the head"):
        surgery.merge(folder, adapter, output=tmp_path / "out")
