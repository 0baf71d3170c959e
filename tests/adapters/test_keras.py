# SPDX-License-Identifier: Apache-2.0
"""KerasHub's files: merged, they are what the kernels of its own layers hold; what cannot be told is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery import convert, merge
from surgery_formats.adapters.keras import KERAS
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.containers.hdf5 import datasets
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.raw import open_file
from surgery_formats.updates import LoRA
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

HERE = GOLDEN / "keras"
CASES = sorted(str(path.parent.relative_to(HERE)) for path in HERE.glob("*/lora*/adapter.lora.h5"))


def base_of(case: str) -> Path:
    return HERE / Path(case).parts[0] / "base"


def changed(
    case: str,
    folder: Path,
    config: Callable[[dict[str, Any]], None] | None = None,
    content: Callable[[bytes], bytes] = bytes,
) -> Path:
    """A copy of a golden file with another configuration, or another content."""
    shutil.copytree(HERE / case, folder)
    if config is not None:
        described = json.loads((folder / "config.json").read_text())
        config(described)
        (folder / "config.json").write_text(json.dumps(described))
    file = folder / "adapter.lora.h5"
    file.write_bytes(content(file.read_bytes()))
    return folder


def test_there_is_a_file_of_every_family() -> None:
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_merges_to_what_the_kernels_hold(case: str, tmp_path: Path) -> None:
    for path in (HERE / case, HERE / case / "adapter.lora.h5"):
        assert format_at(path) is KERAS
    adapter = read_adapter(HERE / case)
    assert adapter.unconsumed() == ()
    assert adapter.known_issues() == ()
    assert_expected(
        base_of(case), merged(base_of(case), HERE / case, tmp_path / "out"), HERE / case / "expected.safetensors"
    )


@pytest.mark.parametrize("case", CASES)
def test_as_peft_it_does_the_same(case: str, tmp_path: Path) -> None:
    assert convert(HERE / case, "peft", output=tmp_path / "to").max_error <= 1e-6
    assert_expected(
        base_of(case), merged(base_of(case), tmp_path / "to", tmp_path / "out"), HERE / case / "expected.safetensors"
    )


@pytest.mark.parametrize("case", CASES)
def test_from_peft_it_is_a_file_of_the_same_layers_and_rank(case: str, tmp_path: Path) -> None:
    """What KerasHub makes of it is compared by ``tests/golden/keras/make.py --load``."""
    convert(HERE / case, "peft", output=tmp_path / "peft")
    assert convert(tmp_path / "peft", "keras", output=tmp_path / "back", base=base_of(case)).max_error <= 1e-6
    assert_expected(
        base_of(case), merged(base_of(case), tmp_path / "back", tmp_path / "out"), HERE / case / "expected.safetensors"
    )
    mine, theirs = (datasets(open_file(folder / "adapter.lora.h5")) for folder in (tmp_path / "back", HERE / case))
    assert {(t.name, t.shape) for t in mine} == {(t.name, t.shape) for t in theirs}
    rank = next(t for t in mine if t.name == "lora/vars/rank")
    assert int(rank.read()) == read_adapter(HERE / case).config["rank"]


def test_a_lora_of_another_program_costs_at_most_the_size_of_a_head(tmp_path: Path) -> None:
    """Heads of 4 rows: a LoRA of rank 3 whose rows have nothing in common takes rank 4, of which the rest is zeros."""
    q, up = "base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
    tensors = {f"{q}.lora_A.weight": draw(1, 3, 16), f"{q}.lora_B.weight": draw(2, 16, 3)}
    tensors |= {f"{up}.lora_A.weight": draw(3, 2, 16), f"{up}.lora_B.weight": draw(4, 24, 2)}
    peft = write_peft(tmp_path / "peft", tensors, lora_alpha=5)
    result = convert(peft, "keras", output=tmp_path / "keras", base=base_of("llama/lora"))
    assert result.max_error <= 1e-6
    assert {entry.outcome for entry in result.entries} == {"folded"}
    found = {t.name: t for t in datasets(open_file(tmp_path / "keras/adapter.lora.h5"))}
    assert found["lora/22/vars/lora_kernel_a"].shape == (16, 4, 4)
    assert not found["lora/11/vars/lora_kernel_a"].read().any()  # of the first block, for which KerasHub looks
    mine, theirs = (merged(base_of("llama/lora"), at, tmp_path / f"{at.name}-out") for at in (tmp_path / "keras", peft))
    assert all(abs(mine[name] - theirs[name]).max() <= 1e-5 for name in theirs)


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="only the base tells them"):
        convert(HERE / "llama/lora", "keras", output=tmp_path / "a")
    with pytest.raises(FitError, match="no model whose KerasHub backbone is known"):
        convert(GOLDEN / "gguf/phi3/lora/peft", "keras", output=tmp_path / "a", base=GOLDEN / "gguf/phi3/base")
    head = {
        "base_model.model.lm_head.lora_A.weight": draw(1, 2, 16),
        "base_model.model.lm_head.lora_B.weight": draw(2, 12, 2),
    }
    with pytest.raises(FitError, match="KerasHub has no such layer in a block"):
        convert(write_peft(tmp_path / "peft", head), "keras", output=tmp_path / "a", base=base_of("llama/lora"))
    convert(HERE / "llama/lora", "peft", output=tmp_path / "plain")
    with pytest.raises(FitError, match="no arrays of BF16"):
        convert(tmp_path / "plain", "keras", output=tmp_path / "a", base=base_of("llama/lora"), dtype="bf16")


def test_a_factor_for_every_head_makes_a_rank_of_its_own() -> None:
    chains = read_adapter(HERE / "llama/lora-all").updates
    ranks = {site.path.split(".")[-2]: chain[0].rank for site, chain in chains.items() if isinstance(chain[0], LoRA)}
    assert ranks == {
        "q_proj": 12,  # 3 for each of 4 heads
        "k_proj": 6,
        "v_proj": 6,
        **dict.fromkeys(("o_proj", "gate_proj", "up_proj", "down_proj"), 3),
    }


def test_the_preset_has_to_be_beside_it(tmp_path: Path) -> None:
    shutil.copy(HERE / "llama/lora/adapter.lora.h5", tmp_path / "a.lora.h5")
    with pytest.raises(FitError, match=r"no config\.json of its KerasHub preset"):
        read_adapter(tmp_path / "a.lora.h5")
    shutil.copy(HERE / "llama/lora/config.json", tmp_path)
    assert "no metadata.json" in read_adapter(tmp_path).known_issues()[0]
    (tmp_path / "metadata.json").write_text(json.dumps({"keras_hub_version": "0.40.1"}))
    assert "KerasHub 0.40.1 wrote it" in read_adapter(tmp_path).known_issues()[0]
    (tmp_path / "metadata.json").write_text(json.dumps({"keras_hub_version": "0.17.0"}))
    assert "KerasHub 0.17.0 wrote it" in read_adapter(tmp_path).known_issues()[0]
    shutil.copy(tmp_path / "a.lora.h5", tmp_path / "b.lora.h5")
    assert not KERAS.detect(tmp_path)
    with pytest.raises(NotFoundError, match=r"no \.lora\.h5, or several"):
        KERAS.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda d: d.update(class_name="XLNetBackbone"), "of KerasHub's XLNetBackbone are not known"),
        (lambda d: d.pop("class_name"), "no configuration of a KerasHub backbone"),
        (lambda d: d["config"].pop("num_layers"), "no num_layers"),
        (lambda d: d["config"].update(num_layers=1), "a layer of this backbone that has no LoRA"),
        (lambda d: d["config"].update(num_query_heads=8), "no factors of rank 2 of self_attn.q_proj"),
        (lambda d: d["config"].update(hidden_dim=24), "no factors of rank 2"),
        (lambda d: d.update(class_name="GPT2Backbone"), "a layer of this backbone that has no LoRA|no factors"),
        (lambda d: d.update(class_name="Qwen3Backbone"), "a layer of this backbone that has no LoRA|no factors"),
        (lambda d: d.update(class_name="GemmaBackbone"), "a layer of this backbone that has no LoRA|no factors"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    config: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FitError, match=said):
        read_adapter(changed("llama/lora", tmp_path / "a", config))


def test_what_shifts_the_numbers_is_not_passed_over(tmp_path: Path) -> None:
    """Norms that only some backbones of a class have, and a vision encoder."""
    with pytest.raises(FitError):
        read_adapter(changed("gemma2/lora", tmp_path / "a", lambda d: d["config"].update(use_post_ffw_norm=False)))
    with pytest.raises(FitError):
        read_adapter(changed("gemma3/lora", tmp_path / "b", lambda d: d["config"].update(use_query_key_norm=False)))
    with pytest.raises(FitError, match="with a vision_encoder"):
        read_adapter(changed("gemma3/lora", tmp_path / "c", lambda d: d["config"].update(vision_encoder={})))


def test_parts_of_a_file_that_are_missing_or_strange_are_refused(tmp_path: Path) -> None:
    for number, (old, new, said) in enumerate(
        (
            (b"lora_kernel_b\x00", b"lora_kernel_c\x00", "neither a rank nor a factor"),
            (b"rank\x00", b"tank\x00", "neither a rank nor a factor"),
            (b"\x0011\x00", b"\x0001\x00", "neither a rank nor a factor"),
            (b"lora_kernel_a\x00", b"lora_kernel_b\x00", "without its|twice|neither"),
        )
    ):
        with pytest.raises(MalformedError, match=said):
            read_adapter(
                changed("llama/lora", tmp_path / str(number), content=lambda c, o=old, n=new: c.replace(o, n, 1))
            )


def test_a_whole_model_says_that_its_lora_is_in_its_kernels(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    said = "a whole model of Keras, into whose kernels Keras adds the LoRAs"
    shutil.copy(GOLDEN / "keras/bfloat16.h5", tmp_path / "a.weights.h5")
    for path in (tmp_path / "a.keras", tmp_path / "a.weights.h5"):
        with pytest.raises(FitError, match=said):
            merge(base_of("llama/lora"), path, output=tmp_path / "out")
        with pytest.raises(FitError, match=said):
            merge(path, HERE / "llama/lora", output=tmp_path / "out")
        with pytest.raises(FitError, match=said):
            surgery.open(path)
