# SPDX-License-Identifier: Apache-2.0
"""Embeddings of texts: the modules of sentence-transformers in the graph, as that library computes them."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from tests.oracles import peft_oracle, recipes
from tests.support.sessions import feed_encoder, open_session

LIMIT = 1e-4
LONG, SHORT = [5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50]
WIDTH, NARROW = 32, 12


def modules(folder, modes, *steps, **settings):
    """Write modules.json, and the modules behind the model: a Dense of an activation, or Normalize."""
    root = "sentence_transformers.models."
    kinds = ["Transformer", "Pooling", *("Dense" if isinstance(step, dict) else step for step in steps)]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds[1:], 1))]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": root + kind}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path in paths[1:]:
        (folder / path).mkdir()
    (folder / paths[1] / "config.json").write_text(
        json.dumps({"word_embedding_dimension": WIDTH, **{f"pooling_mode_{mode}": True for mode in modes}, **settings})
    )
    generator = torch.Generator().manual_seed(11)
    for path, step in zip(paths[2:], steps, strict=True):
        if isinstance(step, dict):
            (folder / path / "config.json").write_text(json.dumps(step))
            shapes = {"linear.weight": (step["out_features"], step["in_features"])}
            shapes |= {"linear.bias": (step["out_features"],)} if step["bias"] else {}
            save_file(
                {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()},
                folder / path / "model.safetensors",
            )
    return folder


def dense(inputs, outputs, activation, *, bias=True):
    name = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
    return {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": name}


def pooled(states, mode):
    """What sentence-transformers 6.2 computes of the states of one text's own tokens."""
    weights = torch.arange(1, len(states) + 1)[:, None]
    return {
        "cls_token": lambda: states[0],
        "max_tokens": lambda: states.max(0).values,
        "mean_tokens": lambda: states.mean(0),
        "mean_sqrt_len_tokens": lambda: states.sum(0) / len(states) ** 0.5,
        "weightedmean_tokens": lambda: (states * weights).sum(0) / weights.sum(),
        "lasttoken": lambda: states[-1],
    }[mode]()


def embedded(model, folder, row, modes):
    """By transformers and the definitions above, one text without padding."""
    with torch.no_grad():
        states = model(torch.tensor([row])).last_hidden_state[0]
    values = torch.cat([pooled(states, mode) for mode in modes])
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(("_Dense", "_Normalize"))):
        if path.name.endswith("Normalize"):
            values = torch.nn.functional.normalize(values, dim=-1)
            continue
        config = json.loads((path / "config.json").read_text())
        linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
        from safetensors.torch import load_file

        linear.load_state_dict(
            {key.removeprefix("linear."): v for key, v in load_file(path / "model.safetensors").items()}
        )
        values = getattr(torch.nn, config["activation_function"].rpartition(".")[2])()(linear(values))
    return values.detach().numpy()


CASES = {
    "minilm": ("bert_sentence", ["mean_tokens"], ["Normalize"]),
    "bge": ("bert_sentence", ["cls_token"], ["Normalize"]),
    "e5": ("roberta_sentence", ["mean_tokens"], []),
    "labse": ("bert_sentence", ["cls_token"], [dense(WIDTH, WIDTH, "Tanh"), "Normalize"]),
    "qwen3": ("qwen3", ["lasttoken"], ["Normalize"]),
    "e5-mistral": ("mistral_short_window", ["lasttoken"], ["Normalize"]),
    "sgpt": ("gpt2", ["weightedmean_tokens"], []),
    "embeddinggemma": (
        "gemma3",
        ["mean_tokens"],
        [dense(WIDTH, 40, "Identity", bias=False), dense(40, WIDTH, "Identity", bias=False), "Normalize"],
    ),
    "several": (
        "distilbert_sentence",
        ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"],
        [dense(6 * WIDTH, NARROW, "GELU"), dense(NARROW, NARROW, "ReLU")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_those_of_sentence_transformers(case, tmp_path):
    name, modes, steps = CASES[case]
    base = modules(recipes.build(name, tmp_path / "base"), modes, *steps)
    model = recipes.load(name, base).base_model  # itself, if it has no head
    wanted = [embedded(model, base, row, modes) for row in (LONG, SHORT)]
    pad = model.config.pad_token_id or 0
    for target in ("cpu", "portable", "cuda"):
        out = tmp_path / target
        result = surgery.export_onnx(base, output=out, task="sentence-similarity", target=target, dtype="fp32")
        session, contract = open_session(out / "model.onnx")
        assert (contract.task, contract.kind) == ("sentence-similarity", "encoder")
        assert ("sentence.safetensors" in result.files) == any(isinstance(step, dict) for step in steps)
        for side in ("right", "left") if contract.padding == "any" else ("right",):
            fill = [pad] * (len(LONG) - len(SHORT))
            ids = np.array([LONG, [*SHORT, *fill] if side == "right" else [*fill, *SHORT]])
            mask = np.ones_like(ids)
            mask[1] = [1] * 4 + [0] * 3 if side == "right" else [0] * 3 + [1] * 4
            feed = {"input_ids": ids, "attention_mask": mask}
            if "token_type_ids" in {port.name for port in session.get_inputs()}:
                feed["token_type_ids"] = np.zeros_like(ids)
            states, found = session.run(["last_hidden_state", "sentence_embedding"], feed)
            assert states.shape == (2, 7, WIDTH)
            for value, expected in zip(found, wanted, strict=True):
                assert np.abs(value - expected).max() <= LIMIT
    surgery.verify(tmp_path / "cpu", against=base)
    surgery.verify(tmp_path / "portable")


def test_adapters_and_16_bits(tmp_path):
    base = modules(
        recipes.build("bert_sentence", tmp_path / "base"), ["mean_tokens"], dense(WIDTH, 8, "Tanh"), "Normalize"
    )
    with peft_oracle.quiet():
        wrapped = peft.get_peft_model(
            recipes.load("bert_sentence", base),
            peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]),
        )
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(3))
        wrapped.save_pretrained(tmp_path / "lora")
    wanted = embedded(wrapped.eval(), base, LONG, ["mean_tokens"])
    surgery.export_onnx(base, tmp_path / "lora", output=tmp_path / "out", task="sentence-similarity")
    session, _ = open_session(tmp_path / "out" / "model.onnx")
    ids = np.array([LONG])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (found,) = session.run(["sentence_embedding"], feed)
    assert np.abs(found[0] - wanted).max() <= LIMIT
    surgery.verify(tmp_path / "out", against=base, adapters=tmp_path / "lora")
    surgery.export_onnx(base, output=tmp_path / "half", task="sentence-similarity", target="portable", dtype="fp16")
    surgery.verify(tmp_path / "half", against=base)
    embedded_file = surgery.export_onnx(base, output=tmp_path / "one", task="sentence-similarity", weights="embed")
    assert "sentence.safetensors" not in embedded_file.files
    (alone,) = open_session(tmp_path / "one" / "model.onnx")[0].run(["sentence_embedding"], feed)
    assert np.abs(alone[0] - embedded(recipes.load("bert_sentence", base), base, LONG, ["mean_tokens"])).max() <= LIMIT


def test_without_the_task_a_graph_is_what_it_was(tmp_path):
    base = modules(recipes.build("bert_sentence", tmp_path / "base"), ["mean_tokens"], "Normalize")
    surgery.export_onnx(base, output=tmp_path / "out")
    ids = np.array([LONG])
    found = feed_encoder(open_session(tmp_path / "out" / "model.onnx")[0], ids, np.ones_like(ids))
    assert set(found) == {"last_hidden_state", "pooler_output"}


def test_a_language_model_with_modules_is_told_apart(tmp_path):
    alone = {"pooling_mode_mean_tokens": False}
    base = modules(recipes.build("qwen3", tmp_path / "base"), ["lasttoken"], "Normalize", **alone)
    warnings = surgery.export_onnx(base, output=tmp_path / "out").warnings
    assert any("--task sentence-similarity" in text for text in warnings)
    assert not surgery.export_onnx(base, output=tmp_path / "graph", task="sentence-similarity").warnings


REFUSED = {
    "a module of its own": (
        ["mean_tokens"],
        ["Normalize"],
        {},
        ("models.Normalize", "models.LSTM"),
        "LSTM",
    ),
    "code": (
        ["mean_tokens"],
        ["Normalize"],
        {},
        ("sentence_transformers.models.Normalize", "custom.Step"),
        "code of its own",
    ),
    "prompts": (["mean_tokens"], [], {"include_prompt": False}, None, "include_prompt"),
    "a mode": (["mean_tokens"], [], {"pooling_mode": "median"}, None, "pooling_mode"),
    "a width": (["mean_tokens"], [], {"word_embedding_dimension": 9}, None, "pools 9 values"),
    "a residual": (["mean_tokens"], [{**dense(WIDTH, WIDTH, "Tanh"), "use_residual": True}], {}, None, "use_residual"),
    "an activation": (["mean_tokens"], [dense(WIDTH, WIDTH, "Softmax")], {}, None, "Softmax"),
    "an input": (
        ["mean_tokens"],
        [{**dense(WIDTH, 4, "Tanh"), "module_input_name": "x"}],
        {},
        None,
        "module_input_name",
    ),
    "a pooling": (["middle_tokens"], [], {}, None, "pooling_mode_middle_tokens"),
    "sizes": (["mean_tokens"], [dense(9, 4, "Tanh")], {}, None, "for 9 values, but gets 32"),
    "no outputs": (["mean_tokens"], [{**dense(WIDTH, 4, "Tanh"), "out_features": 0}], {}, None, "out_features is 0"),
    "a bias": (["mean_tokens"], [{**dense(WIDTH, 4, "Tanh"), "bias": "no"}], {}, None, "bias is no"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_known_is_refused(fault, tmp_path):
    modes, steps, settings, renamed, words = REFUSED[fault]
    base = modules(recipes.build("distilbert_sentence", tmp_path / "base"), modes, *steps, **settings)
    if renamed:
        listed = (base / "modules.json").read_text()
        (base / "modules.json").write_text(listed.replace(*renamed))
    with pytest.raises(FitError, match=words):
        surgery.export_onnx(base, output=tmp_path / "out", task="sentence-similarity")
    assert not (tmp_path / "out").exists()


def test_modules_are_one_list(tmp_path):
    base = modules(recipes.build("distilbert_sentence", tmp_path / "base"), ["mean_tokens"])
    (base / "modules.json").write_text((base / "modules.json").read_text() + ', "more": 1')
    with pytest.raises(MalformedError, match="not a list of modules"):
        surgery.export_onnx(base, output=tmp_path / "out", task="sentence-similarity")


def test_without_modules_nothing_tells_how_to_pool(tmp_path):
    base = recipes.build("distilbert_sentence", tmp_path / "base")
    with pytest.raises(NotFoundError, match=r"modules\.json"):
        surgery.export_onnx(base, output=tmp_path / "out", task="sentence-similarity")


@pytest.mark.parametrize(
    ("layout", "task", "warns"),
    [("plain", None, True), ("optimum", None, False), ("plain", "sentence-similarity", False)],
)
def test_states_that_nobody_pools_are_warned_of(layout, task, warns, tmp_path):
    base = modules(recipes.build("distilbert_sentence", tmp_path / "base"), ["mean_tokens"])
    result = surgery.export_onnx(base, output=tmp_path / "out", task=task, layout=layout)
    assert any("sentence-similarity pools them" in text for text in result.warnings) == warns


@pytest.mark.parametrize(
    ("asked", "settings", "warned"),
    [
        (["cls_token"], {}, "pooled as by sentence-transformers 6, cls"),
        (["cls_token", "max_tokens"], {}, "cls and max"),
        (["cls_token"], {"pooling_mode_mean_tokens": False}, None),
        (["mean_tokens"], {}, None),
        ([], {"pooling_mode": "cls"}, None),
        ([], {}, None),
    ],
)
def test_a_mode_alone_of_which_releases_differ_is_warned_of(asked, settings, warned, tmp_path):
    base = modules(recipes.build("distilbert_sentence", tmp_path / "base"), asked, **settings)
    result = surgery.export_onnx(base, output=tmp_path / "out", task="sentence-similarity")
    told = [text for text in result.warnings if "releases before it add the mean" in text]
    assert len(told) == (warned is not None)
    assert all(warned in text for text in told)


def test_weights_of_a_module_outside_the_folder_are_refused(tmp_path):
    base = modules(recipes.build("distilbert_sentence", tmp_path / "base"), ["mean_tokens"], dense(WIDTH, 4, "Tanh"))
    (weights,) = base.glob("*_Dense/model.safetensors")
    weights.rename(tmp_path / "other.safetensors")
    weights.symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(MalformedError, match="outside the folder"):
        surgery.export_onnx(base, output=tmp_path / "out", task="sentence-similarity")
