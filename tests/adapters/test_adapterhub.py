# SPDX-License-Identifier: Apache-2.0
"""AdapterHub folders: what the library itself saved does what it does in its own forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import convert, inspect, merge
from surgery_formats.adapters.adapterhub import ADAPTERHUB
from surgery_formats.adapters.adapterhub.places import layer_of
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.updates import DoRA, LoRA, OutputDoRA
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

FOLDER = GOLDEN / "adapterhub"
CASES: dict[str, str] = json.loads((FOLDER / "expected.json").read_text())["cases"]
INSERTED = [
    name for name in CASES if any(word in name for word in ("prefix", "prompt", "bottle", "comp", "union", "gated"))
]
MERGED = [name for name in CASES if name not in INSERTED]


@pytest.mark.parametrize("name", MERGED)
def test_it_does_what_the_library_does(name: str, tmp_path: Path) -> None:
    base = FOLDER / "base" / CASES[name]
    assert_expected(base, merged(base, FOLDER / name, tmp_path / "out"), FOLDER / name / "expected.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_consumed(name: str) -> None:
    adapter = read_adapter(FOLDER / name)
    assert adapter.format == "adapterhub"
    assert adapter.unconsumed() == ()
    assert inspect(FOLDER / name).kinds


@pytest.mark.parametrize("name", INSERTED)
def test_what_is_inserted_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"adapter|prefix|prompt|gate|factors"):
        merged(FOLDER / "base" / CASES[name], FOLDER / name, tmp_path / "out")


@pytest.mark.parametrize("name", CASES)
def test_it_is_written_again(name: str, tmp_path: Path) -> None:
    base, again = FOLDER / "base" / CASES[name], tmp_path / "again"
    convert(FOLDER / name, "adapterhub", output=again, base=base if name in MERGED else None)
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (FOLDER / name, again))
    if name not in ("gpt2-lora", "gpt2-lora-v", "gpt2-ia3", "bert-vera"):  # whose factors are spread
        assert after == before
        adapter = read_adapter(FOLDER / name)
        once = {t.name for t in adapter.tensors} - {entry.tensor.name for entry in adapter.ignored}
        assert load_file(again / "adapter.safetensors").keys() == once


@pytest.mark.parametrize("name", [name for name in MERGED if "bert-dora" not in name])
def test_it_survives_the_way_through_peft(name: str, tmp_path: Path) -> None:
    base = FOLDER / "base" / CASES[name]
    convert(FOLDER / name, "peft", output=tmp_path / "peft", base=base)
    convert(tmp_path / "peft", "adapterhub", output=tmp_path / "back", base=base)
    assert read_adapter(tmp_path / "back").format == "adapterhub"
    wanted = merged(base, FOLDER / name, tmp_path / "a")
    got = merged(base, tmp_path / "back", tmp_path / "b")
    assert all(abs(got[key].astype(float) - value).max() <= 2e-6 for key, value in wanted.items())


def _dora(folder: Path, module: str) -> Path:
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 16), f"{stem}.lora_B.weight": draw(2, 16, 2)}
    tensors[f"{stem}.lora_magnitude_vector"] = draw(3, 16) + 4
    return write_peft(folder, tensors, r=2, lora_alpha=4, use_dora=True)


def test_a_dora_that_stretches_biases_is_no_dora_elsewhere(tmp_path: Path) -> None:
    base = FOLDER / "base/bert"
    for name in ("bert-dora", "bert-dora-alpha"):
        with pytest.raises(FitError, match="DoRA of a bias"):
            convert(FOLDER / name, "peft", output=tmp_path / "out", base=base)
    kinds = {
        type(c[0]) for site, c in read_adapter(FOLDER / "bert-dora-alpha").updates.items() if "weight" in site.path
    }
    assert kinds == {OutputDoRA}
    dora = _dora(tmp_path / "dora", "bert.encoder.layer.0.attention.self.query")
    with pytest.raises(FitError, match="stretches the bias"):
        convert(dora, "adapterhub", output=tmp_path / "out", base=base)
    with pytest.raises(FitError, match="only the base tells"):
        convert(dora, "adapterhub", output=tmp_path / "out")


def test_a_dora_of_layers_without_biases_keeps_its_meaning(tmp_path: Path) -> None:
    dora = _dora(tmp_path / "dora", "model.layers.0.self_attn.q_proj")
    convert(dora, "adapterhub", output=tmp_path / "out", base=FOLDER / "base/llama")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())["config"]
    assert (config["alpha"], config["r"], config["use_dora"]) == (2, 2, True)  # lengths are measured without the scale
    update = next(c[0] for site, c in read_adapter(tmp_path / "out").updates.items() if "weight" in site.path)
    assert isinstance(update, DoRA)


def test_ranks_are_padded_scales_folded_and_other_modules_named(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.{}.{}"
    sizes = {stem.format(0, "self_attn.q_proj"): (16, 16, 2), stem.format(1, "mlp.down_proj"): (16, 24, 3)}
    tensors = {}
    for module, (out, inputs, rank) in sizes.items():
        tensors |= {f"{module}.lora_A.weight": draw(1, rank, inputs), f"{module}.lora_B.weight": draw(2, out, rank)}
    lora = write_peft(tmp_path / "lora", tensors, r=3, lora_alpha=6, rank_pattern={"q_proj": 2})
    result = convert(lora, "adapterhub", output=tmp_path / "out")
    assert {entry.outcome for entry in result.entries} == {"exact", "folded"}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())["config"]
    stated = [config[key] for key in ("r", "attn_matrices", "intermediate_lora", "output_lora")]
    assert stated == [3, ["q"], True, False]
    extra = stem.format(0, "self_attn.o_proj")
    tensors |= {f"{extra}.lora_A.weight": draw(1, 3, 16), f"{extra}.lora_B.weight": draw(2, 16, 3)}
    more = write_peft(tmp_path / "more", tensors, r=3, rank_pattern={"q_proj": 2})
    with pytest.raises(FitError, match="no adapters on this module"):
        convert(more, "adapterhub", output=tmp_path / "x")


def _changed(tmp_path: Path, **fields: object) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(FOLDER / "llama-lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    inner = {key: value for key, value in fields.items() if key in config["config"]}
    whole = {**config, **fields, "config": {**config["config"], **inner}}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def test_files_of_versions_that_did_not_scale_are_read_as_trained(tmp_path: Path) -> None:
    adapter = read_adapter(_changed(tmp_path, version="adapters.1.0.1"))
    loras = [update for chain in adapter.updates.values() for update in chain if isinstance(update, LoRA)]
    assert {lora.scale for lora in loras} == {1.0}
    assert "adapters#770" in adapter.known_issues()[0]


def test_an_absurd_version_is_none_of_those(tmp_path: Path) -> None:
    adapter = read_adapter(_changed(tmp_path, version=f"adapters.{'1' * 5000}.0"))
    assert {update.scale for chain in adapter.updates.values() for update in chain if isinstance(update, LoRA)} != {1.0}


@pytest.mark.parametrize(("module", "layer"), [("model.layers.12.mlp", 12), ("a.\u00b2.b", None), ("9" * 5000, None)])
def test_the_number_of_a_layer_is_written_in_plain_digits(module: str, layer: int | None) -> None:
    assert layer_of(module) == layer


@pytest.mark.parametrize("case", ["bert-dora", "bert-vera"])
def test_magnitudes_are_one_for_each_row(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(FOLDER / case, folder)
    tensors = load_file(folder / "adapter.safetensors")
    module = next(name for name in tensors if name.endswith(("lora_A", "vera_D"))).rpartition(".")[0]
    save_file({**tensors, f"{module}.m.weight": np.ones((3, 1), np.float32)}, folder / "adapter.safetensors")
    with pytest.raises(FitError, match="magnitudes for"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"name": "other"}, "not a key of the adapter 'other'"),
        ({"r": 5}, "no LoRA of rank 3"),
        ({"r": "3"}, "'r' is"),
        ({"alpha": None}, "'alpha' is"),
        ({"composition_mode": "scale"}, "of an .IA"),
        ({"composition_mode": "sum"}, "'composition_mode' is"),
    ],
)
def test_a_malformed_folder_is_refused(fields: dict[str, object], fault: str, tmp_path: Path) -> None:
    with pytest.raises((MalformedError, FitError), match=fault):
        read_adapter(_changed(tmp_path, **fields))


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = _changed(tmp_path)
    (folder / "adapter.safetensors").unlink()
    assert not ADAPTERHUB.detect(folder)
    with pytest.raises(NotFoundError, match=r"pytorch_adapter\.bin"):
        ADAPTERHUB.read(folder)


def test_a_head_of_the_library_goes_along_as_files(tmp_path: Path) -> None:
    source = read_adapter(FOLDER / "bert-lora")
    assert sorted(source.files_beside) == ["head_config.json", "pytorch_model_head.bin"]
    assert "goes along as a file" in source.known_issues()[-1]
    assert source.unconsumed() == ()
    for target in ("adapterhub", "peft"):
        convert(FOLDER / "bert-lora", target, output=tmp_path / target)
        for name in source.files_beside:
            assert (tmp_path / target / name).read_bytes() == (FOLDER / "bert-lora" / name).read_bytes()
        assert "pytorch_model_head.bin" in read_adapter(tmp_path / target).files_beside
    merge(FOLDER / "base/bert", FOLDER / "bert-lora", output=tmp_path / "merged")
    assert (tmp_path / "merged/pytorch_model_head.bin").exists()
    assert inspect(tmp_path / "merged").parameters == inspect(FOLDER / "base/bert").parameters


def test_a_format_of_one_file_has_no_place_for_a_head(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"loralib is one file, and 'pytorch_model_head\.bin' beside"):
        convert(FOLDER / "bert-lora", "loralib", output=tmp_path / "x.pt")
    result = convert(FOLDER / "bert-lora", "loralib", output=tmp_path / "x.pt", allow_loss=True)
    assert [entry.site for entry in result.entries if entry.outcome == "dropped"] == ["pytorch_model_head.bin"]


def _union(tmp_path: Path) -> Path:
    """A LoRA and a bottleneck under one name, as ``ConfigUnion`` saves them."""
    folder, both = tmp_path / "union", ("bert-dora", "bert-bottleneck")
    folder.mkdir()
    tensors, configs = {}, []
    for case in both:
        stored = load_file(FOLDER / case / "adapter.safetensors")
        tensors |= {key.replace(f".{case}.", ".union."): value for key, value in stored.items()}
        config = json.loads((FOLDER / case / "adapter_config.json").read_text())
        configs.append(config["config"])
    save_file(tensors, folder / "adapter.safetensors")
    union = {**config, "name": "union", "config": {"architecture": "union", "configs": configs}}
    (folder / "adapter_config.json").write_text(json.dumps(union))
    return folder


def test_of_a_union_what_can_merge_is_merged_when_asked(tmp_path: Path) -> None:
    folder, base = _union(tmp_path), FOLDER / "base/bert"
    assert set(inspect(folder).kinds) == {"DoRA", "bottleneck adapter"}
    with pytest.raises(FitError, match="a network of its own behind a layer") as caught:
        merge(base, folder, output=tmp_path / "out")
    assert "`without=`" in (caught.value.hint or "")
    merge(base, folder, output=tmp_path / "out", without="*.adapters")
    wanted = load_file(FOLDER / "bert-dora/expected.safetensors")
    got = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert wanted
    assert all(abs(got[key] - value).max() <= 1e-6 for key, value in wanted.items())
