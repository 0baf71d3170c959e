# SPDX-License-Identifier: Apache-2.0
"""P-tuning v2 of encoders: keys and values in front of every layer's, as PEFT attaches them; `run` and `verify` too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import surgery
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int64)
TOLERANCE = 1e-4
CASES = {
    "bert_sequence": "SEQ_CLS",
    "bert_token": "TOKEN_CLS",
    "bert_spans": "QUESTION_ANS",
    "bert_sentence": "FEATURE_EXTRACTION",
    "roberta_sequence": "SEQ_CLS",
    "roberta_token": "TOKEN_CLS",
    "xlm_roberta_sequence": "SEQ_CLS",
    "camembert_token": "TOKEN_CLS",
    "electra_sequence": "SEQ_CLS",
    "electra_token": "TOKEN_CLS",
}


def prefixed(name, task, folder, kind="prefix"):
    """A base and its prefix, whose classifier is trained too where PEFT trains it."""
    base = recipes.build(name, folder / "base")
    return base, trained.train(name, base, trained.PROMPTS[kind], folder / "prefix", task=task)


def padded(name):
    """Rows with the padding that the model's own positions are told by."""
    return np.where(
        MASK == 1, IDS, 0 if name.startswith(("bert", "electra")) else recipes.CASES[name].fields["pad_token_id"]
    )


TARGETS = [(name, "portable" if name.endswith("token") else "cpu") for name in CASES]


@pytest.mark.parametrize(("name", "target"), TARGETS)
def test_an_encoder_with_a_prefix_gives_what_peft_gives(name, target, tmp_path):
    base, adapter = prefixed(name, CASES[name], tmp_path)
    result = surgery.export_onnx(base, prefix=adapter, output=tmp_path / "out", target=target)
    assert (result.contract.virtual_tokens, result.contract.prompt_kind) == (trained.TOKENS, "PREFIX_TUNING")
    ids = padded(name)
    model = trained.attached(name, base, (adapter, 1.0))
    kept = CASES[name] in ("SEQ_CLS", "TOKEN_CLS")  # PEFT 0.21 drops the types of its other tasks
    types = np.arange(ids.size).reshape(ids.shape) % 2 * kept
    session, _ = open_session(tmp_path / "out" / "model.onnx")
    feed = {"input_ids": ids, "attention_mask": MASK}
    if any(one.name == "token_type_ids" for one in session.get_inputs()):
        feed["token_type_ids"] = types
    with torch.no_grad():
        expected = model(**{key: torch.from_numpy(value) for key, value in feed.items()})
        plain = recipes.load(name, base)(**{key: torch.from_numpy(value) for key, value in feed.items()})
    found = session.run(None, feed)
    for output, array in zip((one.name for one in session.get_outputs()), found, strict=True):
        wanted, before = expected[output].numpy(), plain[output].numpy()
        if array.shape[:2] == ids.shape:
            array, wanted, before = (one[MASK == 1] for one in (array, wanted, before))
        assert np.abs(wanted - before).max() > 0.05
        assert np.abs(array - wanted).max() <= TOLERANCE, output
    checked = surgery.verify(tmp_path / "out", against=base, adapters=adapter)
    assert checked.difference <= TOLERANCE
    assert any(check.name == "soft prompt" for check in checked.checks)


def test_run_classifies_with_the_prefix_and_without_it_as_the_base(tmp_path):
    base, adapter = prefixed("roberta_sequence", "SEQ_CLS", tmp_path, "prefix projected")
    surgery.export_onnx(base, adapter, output=tmp_path / "out")
    model = trained.attached("roberta_sequence", base, (adapter, 1.0))
    ran = surgery.run(tmp_path / "out", [IDS[0].tolist(), IDS[1, :4].tolist()], device="cpu")
    assert ran.virtual_tokens == trained.TOKENS
    for row, text in zip((IDS[:1], IDS[1:, :4]), ran.texts, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(row)).logits.softmax(-1)[0].tolist()
        assert np.abs(np.sort(list(text.scores[0].values())) - np.sort(expected)).max() <= TOLERANCE


def test_slots_beside_a_prefix(tmp_path):
    base, adapter = prefixed("bert_sequence", "SEQ_CLS", tmp_path)
    lora = trained.train(
        "bert_sequence", base, ("LoraConfig", {"r": 3, "target_modules": ["query"]}), tmp_path / "lora", task="SEQ_CLS"
    )
    surgery.export_onnx(base, swap=lora, prefix=adapter, output=tmp_path / "out")
    checked = surgery.verify(tmp_path / "out")
    assert checked.difference <= TOLERANCE
    assert any("slots filled" in check.name for check in checked.checks)


def test_an_encoder_whose_class_takes_no_keys_refuses_them_by_name(tmp_path):
    base, adapter = prefixed("bert_sequence", "SEQ_CLS", tmp_path)
    other = recipes.build("albert_sequence", tmp_path / "other")
    with pytest.raises(FitError, match="this encoder's class does not take") as error:
        surgery.export_onnx(other, prefix=adapter, output=tmp_path / "out")
    assert "embeddings" in str(error.value.hint)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FitError, match="several prompts"):
        surgery.export_onnx(base, prefix=adapter, prompt_form="kv", output=tmp_path / "out")
