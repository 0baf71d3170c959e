# SPDX-License-Identifier: Apache-2.0
"""All of an adapter's folder is accounted for: weights in second files, tokenizers, poolings, cards, and what is next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError, MalformedError
from tests.support.adapter_files import draw
from tests.support.kit import HIDDEN, make_base, make_lora

NORM = "model.norm.weight"
HOME = "/".join(("", "home", "somebody"))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_base(tmp_path / "base", torch.float32), make_lora(tmp_path / "lora")


def merged(pair: tuple[Path, Path], folder: Path) -> tuple[surgery.MergeResult, dict[str, np.ndarray]]:
    result = surgery.merge(*pair, output=folder)
    return result, load_file(folder / "model.safetensors")


def _pickle(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)


@pytest.mark.parametrize(
    ("name", "write", "key"),
    [
        ("non_lora_state_dict.bin", _pickle, f"base_model.model.{NORM}"),
        ("non_lora_trainables.bin", _pickle, f"base_model.model.{NORM}"),
        ("embedding.safetensors", lambda path, tensors: save_file(dict(tensors), path), NORM),
    ],
)
def test_parameters_of_a_second_file_take_the_place_of_the_base_s(
    name: str,
    write: Callable[[Path, Mapping[str, np.ndarray]], None],
    key: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    plain = merged(pair, tmp_path / "plain")[1]
    value = draw(3, HIDDEN)
    write(pair[1] / name, {key: value})
    result, tensors = merged(pair, tmp_path / "out")
    assert np.array_equal(tensors[NORM], value)
    assert all(np.array_equal(tensors[other], plain[other]) for other in plain if other != NORM)
    assert any(name in warning and NORM in warning for warning in result.warnings)
    assert any(name in trap for trap in surgery.inspect(pair[1]).traps)  # type: ignore[union-attr]
    surgery.convert(pair[1], "peft", output=tmp_path / "one")  # where PEFT finds them, as modules of its own
    again = merged((pair[0], tmp_path / "one"), tmp_path / "again")[1]
    assert all(np.array_equal(tensors[other], again[other]) for other in tensors)
    assert (
        NORM.removesuffix(".weight")
        in json.loads((tmp_path / "one/adapter_config.json").read_text())["modules_to_save"]
    )


def test_a_parameter_that_the_base_lacks_is_refused_by_name(pair: tuple[Path, Path]) -> None:
    save_file({"projector.weight": draw(3, 4)}, pair[1] / "projector.safetensors")
    with pytest.raises(FitError, match=r"no parameter 'projector.weight'") as error:
        surgery.merge(*pair, dry_run=True)
    assert "projector.safetensors" in str(error.value.file)


def test_a_parameter_in_two_files_is_refused(pair: tuple[Path, Path]) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({f"base_model.model.{NORM}": draw(3, HIDDEN)}, pair[1] / name)
    with pytest.raises(MalformedError, match="in two files"):
        surgery.inspect(pair[1])


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_value_head_goes_along_and_is_spoken_of(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    head = {"v_head.summary.weight": draw(3, 1, HIDDEN), "v_head.summary.bias": draw(4, 1)}
    (save_file if name.endswith("safetensors") else lambda tensors, path: _pickle(path, tensors))(head, pair[1] / name)
    result, _ = merged(pair, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (pair[1] / name).read_bytes()
    assert any(name in warning and "value head" in warning for warning in result.warnings)
    surgery.convert(pair[1], "peft", output=tmp_path / "again")
    assert (tmp_path / "again" / name).read_bytes() == (pair[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "tensors", "says"),
    [
        ("model.safetensors", {NORM: draw(1, HIDDEN)}, "a full model by its name: not read"),
        ("adapters.safetensors", {"layers.0.q_proj.lora_a": draw(1, 4, 4)}, "another adapter by its tensors: not read"),
        ("model.onnx", {NORM: draw(1, HIDDEN)}, "weights that are not read here"),
        ("notes.bin", None, "is not read"),
        ("adapter_model.bin", None, "where there is another: not read"),
        ("adapter_model-00001-of-00002.safetensors", {NORM: draw(1, HIDDEN)}, "where there is another: not read"),
    ],
)
def test_other_weights_are_named(
    name: str, tensors: dict[str, np.ndarray] | None, says: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = merged(pair, tmp_path / "plain")[1]
    if tensors is None:
        (pair[1] / name).write_bytes(b"no pickle")
    else:
        save_file(tensors, pair[1] / name)
    result, out = merged(pair, tmp_path / "out")
    assert any(name in warning and says in warning for warning in result.warnings)
    assert all(np.array_equal(out[key], plain[key]) for key in plain)


def test_weights_that_no_rule_knows_are_refused_by_name(pair: tuple[Path, Path]) -> None:
    save_file({NORM: draw(1, HIDDEN)}, pair[1] / "extra.safetensors")
    for operate in (surgery.merge, lambda _, adapter, **options: surgery.convert(adapter, "mlx", **options)):
        with pytest.raises(FitError, match="not used by any update") as error:
            operate(*pair, dry_run=True)
        assert "extra.safetensors" in str(error.value.file)
        assert "move it out" in str(error.value.hint)
    assert any("extra.safetensors" in trap for trap in surgery.inspect(pair[1]).traps)  # type: ignore[union-attr]


def test_states_of_a_training_are_passed_over(pair: tuple[Path, Path]) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (pair[1] / name).write_bytes(b"anything")
    assert surgery.merge(*pair, dry_run=True).warnings == ()


BASES = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}', "special_tokens_map.json": "{}"}
TRAINED = {
    "tokenizer.json": '{"added": 1}',
    "tokenizer_config.json": '{"eos_token": "<|im_end|>"}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


def put(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def found(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in names if (folder / name).exists()}


def test_a_tokenizer_that_differs_is_taken_whole_with_its_template(pair: tuple[Path, Path], tmp_path: Path) -> None:
    put(pair[0], {**BASES, "merges.txt": "old", "preprocessor_config.json": "{}", "tokenization_own.py": "# code"})
    put(pair[1], TRAINED)
    result, _ = merged(pair, tmp_path / "out")
    assert found(tmp_path / "out", {**BASES, **TRAINED, "merges.txt": ""}) == TRAINED
    assert (tmp_path / "out/preprocessor_config.json").exists()
    assert (tmp_path / "out/tokenization_own.py").exists()
    assert "chat_template.jinja" in str(result.summary())
    assert "chat_template.jinja" in (tmp_path / "out/surgery_manifest.json").read_text()


def test_a_tokenizer_that_is_the_base_s_changes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    put(pair[0], {**BASES, "merges.txt": "old"})
    put(pair[1], {name: BASES[name] for name in ("tokenizer.json", "tokenizer_config.json")})
    merged(pair, tmp_path / "out")
    assert found(tmp_path / "out", {**BASES, "merges.txt": ""}) == {**BASES, "merges.txt": "old"}
    assert "carried" not in json.loads((tmp_path / "out/surgery_manifest.json").read_text())["inputs"]


def test_a_template_alone_joins_the_base_s_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    put(pair[0], BASES)
    put(pair[1], {"chat_template.jinja": "{{ messages }}"})
    merged(pair, tmp_path / "out")
    assert found(tmp_path / "out", {**BASES, **TRAINED}) == {**BASES, "chat_template.jinja": "{{ messages }}"}


def test_two_tokenizers_that_differ_leave_the_base_s(pair: tuple[Path, Path], tmp_path: Path) -> None:
    put(pair[0], BASES)
    other = shutil.copytree(pair[1], tmp_path / "other")
    put(pair[1], TRAINED)
    put(other, {**TRAINED, "tokenizer.json": '{"added": 2}'})
    result = surgery.merge(pair[0], [pair[1], other], output=tmp_path / "out")
    assert found(tmp_path / "out", {**BASES, **TRAINED}) == BASES
    assert "'lora', 'other' each bring another tokenizer: the base's is kept" in result.warnings


def test_convert_and_combine_carry_the_whole_set(pair: tuple[Path, Path], tmp_path: Path) -> None:
    put(pair[1], TRAINED)
    surgery.convert(pair[1], "compact", output=tmp_path / "compact")
    surgery.convert(tmp_path / "compact", "peft", output=tmp_path / "back")
    surgery.combine([(pair[1], 0.5)], output=tmp_path / "half")
    for name in ("compact", "back", "half"):
        assert found(tmp_path / name, TRAINED) == TRAINED


def test_the_pooling_of_sentence_transformers_is_the_adapter_s(pair: tuple[Path, Path], tmp_path: Path) -> None:
    listed = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}, {"path": 7}]
    put(pair[0], {"modules.json": json.dumps(listed), "1_Pooling/config.json": '{"mode": "cls"}'})
    put(
        pair[1],
        {
            "modules.json": json.dumps([*listed, {"path": "2_Dense"}]),
            "1_Pooling/config.json": '{"mode": "mean"}',
            "2_Dense/config.json": "{}",
        },
    )
    save_file({"linear.weight": draw(1, 4, 4)}, pair[1] / "2_Dense/model.safetensors")
    result, _ = merged(pair, tmp_path / "out")
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == '{"mode": "mean"}'
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == (
        pair[1] / "2_Dense/model.safetensors"
    ).read_bytes()
    assert 'SentenceTransformer("' in str(result.summary())


CARD = """---
license: llama3.2
license_link: https://example.org/license
language:
- en
- de
base_model: someone/else
tags:
- chat
model-index:
- name: scores
extra_gated_prompt: agree
---
# The base
"""


def test_a_card_keeps_the_base_s_licence_and_names_the_base_that_was_given(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "hub" / "models--org--given" / "snapshots" / "0123"
    cache.parent.mkdir(parents=True)
    shutil.move(pair[0], cache)
    (cache / "README.md").write_text(CARD)
    config = json.loads((pair[1] / "adapter_config.json").read_text())
    (pair[1] / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/recorded"}))
    surgery.merge(cache, pair[1], output=tmp_path / "out")
    head = (tmp_path / "out/README.md").read_text().split("---\n")[1].splitlines()
    assert head == [
        "base_model: org/given",
        "language:",
        "- en",
        "- de",
        "library_name: transformers",
        "license: llama3.2",
        "license_link: https://example.org/license",
        "pipeline_tag: text-generation",
        "tags:",
        "- merge",
        "- chat",
        "base_model_relation: merge",
    ]


@pytest.mark.parametrize(("recorded", "named"), [("org/base", True), ("org/other", False), ("/srv/org/base", False)])
def test_a_recorded_base_is_named_if_it_is_called_as_the_one_given(
    recorded: str, named: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    config = json.loads((pair[1] / "adapter_config.json").read_text())
    (pair[1] / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": recorded}))
    surgery.merge(*pair, output=tmp_path / "out")
    assert ("base_model: org/base" in (tmp_path / "out/README.md").read_text()) is named


@pytest.mark.parametrize("recorded", [f"{HOME}/secret/llama", "~/secret/llama", "C:\\secret\\llama"])
def test_no_path_of_a_machine_is_in_card_or_manifest(recorded: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, name, key in (
        (pair[0], "config.json", "_name_or_path"),
        (pair[1], "adapter_config.json", "base_model_name_or_path"),
    ):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {key: recorded}))
    surgery.merge(*pair, output=tmp_path / "out")
    for name in ("README.md", "surgery_manifest.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "secret" not in text
        assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("fields", "loader"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "AutoModelForSequenceClassification"),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "Qwen2_5_VLForConditionalGeneration"),
        ({"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}, "AutoModel"),
        ({"architectures": ['x"); evil("']}, "AutoModel"),
    ],
)
def test_next_is_the_loader_of_the_class(
    fields: dict[str, Any], loader: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    config = json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(json.dumps(config | fields))
    result, _ = merged(pair, tmp_path / "out")
    assert f'load it with transformers: {loader}.from_pretrained("' in str(result.summary())


def test_next_is_diffusers_class_of_a_lone_network(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    result, _ = merged(pair, tmp_path / "out")
    assert 'load it with diffusers: FluxTransformer2DModel.from_pretrained("' in str(result.summary())


def test_next_is_the_class_that_a_trained_head_makes_of_the_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[1] / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = draw(3, 2, HIDDEN)
    save_file(tensors, pair[1] / "adapter_model.safetensors")
    config = json.loads((pair[1] / "adapter_config.json").read_text())
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    (pair[1] / "adapter_config.json").write_text(json.dumps(config | fields))
    result, _ = merged(pair, tmp_path / "out")
    assert "AutoModelForSequenceClassification.from_pretrained(" in str(result.summary())
    assert "pipeline_tag: text-classification" in (tmp_path / "out/README.md").read_text()


def test_next_has_the_variant_of_the_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "model.safetensors").rename(pair[0] / "model.fp16.safetensors")
    result = surgery.merge(*pair, output=tmp_path / "out")
    assert (tmp_path / "out/model.fp16.safetensors").exists()
    assert '", variant="fp16")' in str(result.summary())


def test_no_other_manifest_has_a_path_of_a_machine(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((pair[1] / "adapter_config.json").read_text())
    recorded = config | {"base_model_name_or_path": f"{HOME}/secret/llama"}
    (pair[1] / "adapter_config.json").write_text(json.dumps(recorded))
    merged(pair, tmp_path / "out")
    surgery.convert(pair[1], "mlx", output=tmp_path / "mlx", base=pair[0])
    surgery.combine([(pair[1], 0.5)], output=tmp_path / "half")
    surgery.resize(pair[1], output=tmp_path / "small", rank=1)
    surgery.extract_lora(pair[0], tmp_path / "out", output=tmp_path / "found", rank=2)
    for name in ("mlx", "half", "small", "found"):
        text = (tmp_path / name / "surgery_manifest.json").read_text()
        assert "secret" not in text, name
        assert str(tmp_path) not in text, name
