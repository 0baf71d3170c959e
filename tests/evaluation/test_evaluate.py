# SPDX-License-Identifier: Apache-2.0
"""Bits per byte are those of transformers and PEFT, in graphs and in the reference, and two models are compared token by token."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import surgery
from examples.evaluate import load, nats
from surgery.evaluation.windows import cut
from surgery.progress import Progress
from surgery_formats.errors import FitError, InputError, MalformedError, NotFoundError, SurgeryError, UsageError

EXAMPLES = Path("examples")
BASE, TARGET = EXAMPLES / "base", EXAMPLES / "heldout" / "target.txt"
BYTES = 3000
ATTACHED = ("lora", "dora", "prompt")


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "excerpt.txt"
    path.write_bytes(TARGET.read_bytes()[:BYTES])
    return path


@pytest.fixture(scope="module")
def ids(excerpt: Path) -> list[int]:
    tokens: list[int] = AutoTokenizer.from_pretrained(BASE)(excerpt.read_text(), add_special_tokens=False)["input_ids"]
    return tokens


@given(tokens=st.integers(1, 400), context=st.integers(1, 50), data=st.data())
def test_every_token_is_scored_once_and_behind_enough_others(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = list(cut(tokens, context, stride))
    scored = [token for window in windows for token in range(window.scored, window.stop)]
    assert scored == list(range(tokens))
    assert all(window.stop - window.start <= context for window in windows)
    assert all(window.scored - window.start == context - stride for window in windows[1:])


def test_windows_leave_no_gap() -> None:
    with pytest.raises(FitError, match="leave some out"):
        list(cut(100, 10, 11))


@pytest.mark.parametrize("name", ["base", "tuned", *ATTACHED])
def test_the_figures_are_those_of_transformers_and_peft(name: str, excerpt: Path, ids: list[int]) -> None:
    folder = EXAMPLES / name
    wanted = nats(load(folder, BASE), ids, AutoTokenizer.from_pretrained(BASE).bos_token_id) / math.log(2) / BYTES
    found = (
        surgery.eval(BASE, adapters=folder, text=excerpt) if name in ATTACHED else surgery.eval(folder, text=excerpt)
    )
    assert found.bits_per_byte == pytest.approx(wanted, abs=1e-5)
    assert (found.tokens, found.text_bytes) == (len(ids), BYTES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", json.loads((EXAMPLES / "results.json").read_text()), ids=lambda one: str(one["model"])
)
@pytest.mark.parametrize("kind", ["source", "target"])
def test_the_published_figures_of_the_examples(entry: dict[str, Any], kind: str) -> None:
    name, text = entry["model"], EXAMPLES / "heldout" / f"{kind}.txt"
    attached = {"adapters": EXAMPLES / name} if name in ATTACHED else {}
    found = surgery.eval(BASE if attached else EXAMPLES / name, text=text, **attached)
    assert found.bits_per_byte == pytest.approx(entry[kind], abs=1e-3)


def test_divergence_and_agreement_are_torchs(excerpt: Path, ids: list[int]) -> None:
    found = surgery.eval(BASE, against=EXAMPLES / "tuned", text=excerpt, context=50, stride=50)
    divergence, same = 0.0, 0
    models = [load(folder, BASE) for folder in (BASE, EXAMPLES / "tuned")]
    for start in range(0, len(ids), 50):
        row = torch.tensor([[0, *ids[start : start + 50]]])
        with torch.inference_mode():
            model, other = (torch.log_softmax(each(input_ids=row).logits[0, :-1].double(), -1) for each in models)
        divergence += float(torch.nn.functional.kl_div(model, other, log_target=True, reduction="sum"))
        same += int((model.argmax(-1) == other.argmax(-1)).sum())
    assert found.divergence == pytest.approx(divergence / len(ids), rel=1e-4)
    assert found.agreement == pytest.approx(same / len(ids), abs=2 / len(ids))
    assert found.against is not None
    assert found.against.bits_per_byte == pytest.approx(
        surgery.eval(EXAMPLES / "tuned", text=excerpt, context=50, stride=50).bits_per_byte
    )


def test_a_graph_computes_what_its_model_does(tmp_path: Path, excerpt: Path) -> None:
    surgery.export_onnx(BASE, adapters="examples/prompt", output=tmp_path / "prompt")
    found = surgery.eval(tmp_path / "prompt", against=BASE, against_adapters="examples/prompt", text=excerpt)
    assert found.model.computed_by == "onnxruntime on cpu"
    assert found.divergence is not None
    assert found.divergence < 1e-6
    assert found.bits_per_byte == pytest.approx(found.against.bits_per_byte, abs=1e-5)  # type: ignore[union-attr]


def test_slots_are_filled_at_a_strength(tmp_path: Path, excerpt: Path) -> None:
    surgery.export_onnx(BASE, swap="examples/lora", output=tmp_path / "slots")
    file = tmp_path / "slots" / "adapters" / "lora.onnx_adapter"
    found = surgery.eval(
        tmp_path / "slots", adapters=(file, 0.5), against=BASE, against_adapters=("examples/lora", 0.5), text=excerpt
    )
    assert found.divergence is not None
    assert found.divergence < 1e-6
    assert found.model.adapters == (f"{file}=0.5",)


def test_codes_cost_what_they_do(tmp_path: Path, excerpt: Path) -> None:
    surgery.export_onnx(BASE, output=tmp_path / "int4", weights_type="int4")
    found = surgery.eval(tmp_path / "int4", against=BASE, text=excerpt)
    assert found.divergence is not None
    assert found.agreement is not None
    assert 1e-3 < found.divergence < 1
    assert 0.5 < found.agreement < 1


def test_tokens_stand_in_for_a_tokenizer(tmp_path: Path, excerpt: Path, ids: list[int]) -> None:
    np.save(tmp_path / "ids.npy", np.array(ids, np.int32))
    alone = surgery.eval(BASE, ids=tmp_path / "ids.npy")
    both = surgery.eval(BASE, ids=tmp_path / "ids.npy", text=excerpt)
    assert alone.bits_per_byte is None
    assert both == surgery.eval(BASE, text=excerpt)
    assert alone.model.bits_per_token == both.model.bits_per_token


def test_a_limit_cuts_no_character(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("naïve " * 10, encoding="utf-8")
    found = surgery.eval(BASE, text=path, limit=3)
    assert (found.text_bytes, found.limited) == (2, True)


REFUSED: dict[str, tuple[bytes, type[SurgeryError], str]] = {
    "latin-1": ("naïve".encode("latin-1"), MalformedError, "not a text in UTF-8"),
    "utf-16": ("naive".encode("utf-16"), MalformedError, "not a text in UTF-8"),
    "utf-16 without a mark": ("naive".encode("utf-16-le"), MalformedError, "as in UTF-16"),
    "cut off": ("naï".encode()[:-1], MalformedError, "not a text in UTF-8"),
    "empty": (b"", FitError, "there is no text"),
    "blank": (b" \n\n", FitError, "there is no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    data, kind, said = REFUSED[name]
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(kind, match=said):
        surgery.eval(BASE, text=tmp_path / "text")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 2), np.int64), "not a row of token ids"),
        (np.zeros(3), "not a row of token ids"),
        (np.zeros(0, np.int64), "no tokens"),
        (np.array([-1]), "below 0"),
        (np.array([1536]), "has 1536 tokens, and the text the token 1536"),
    ],
)
def test_what_are_no_tokens_is_refused(array: np.ndarray, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(FitError, match=said):
        surgery.eval(BASE, ids=tmp_path / "ids.npy")


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, excerpt: Path) -> None:
    with pytest.raises(FitError, match="an adapter where a full model was expected"):
        surgery.eval("examples/lora", text=excerpt)
    with pytest.raises(UsageError, match="adapters of no model"):
        surgery.eval(BASE, against_adapters="examples/lora", text=excerpt)
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        surgery.eval(BASE)
    with pytest.raises(InputError):
        surgery.eval(BASE, text=tmp_path / "nowhere")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(BASE / name, bare / name)
    with pytest.raises(
        NotFoundError, match=r"no tokenizer\.json beside the model; copy the model's, or give token ids with `ids=`"
    ):
        surgery.eval(bare, text=excerpt)

    tensors = load_file(BASE / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        os.link(BASE / name, damaged / name)
    with pytest.raises(
        FitError, match="no finite numbers; a weight is NaN or Inf, or so large that a product overflows"
    ):
        surgery.eval(damaged, text=excerpt)


def test_models_of_other_vocabularies_are_not_compared(tmp_path: Path, excerpt: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(BASE / name, other / name)
    tokenizer = json.loads((BASE / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FitError, match="different vocabularies"):
        surgery.eval(BASE, against=other, text=excerpt)


def test_progress_advances_layer_by_layer_within_a_window(tmp_path: Path, ids: list[int]) -> None:
    """One window of a large model takes minutes."""
    np.save(tmp_path / "ids.npy", np.array(ids[:120]))
    layers = json.loads((BASE / "config.json").read_text())["num_hidden_layers"]
    steps: list[Progress] = []
    found = surgery.eval(BASE, against=BASE, adapters="examples/lora", ids=tmp_path / "ids.npy", progress=steps.append)
    assert found.windows == 1
    assert [step.done for step in steps] == [round(120 * n / (2 * layers)) for n in range(1, 2 * layers + 1)]
    assert {step.total for step in steps} == {120}


def test_progress_of_a_graph_advances_window_by_window(tmp_path: Path, excerpt: Path) -> None:
    surgery.export_onnx(BASE, output=tmp_path / "graph")
    steps: list[Progress] = []
    found = surgery.eval(tmp_path / "graph", text=excerpt, context=200, stride=100, progress=steps.append)
    assert found.windows > 5
    assert [step.done for step in steps] == [round(BYTES * n / found.windows) for n in range(1, found.windows + 1)]
