# SPDX-License-Identifier: Apache-2.0
"""Compact folders: every kind of update goes in and out, and what is written is what is stated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery
from surgery import convert
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.updates import LoRA
from tests.support.adapter_files import (
    GOLDEN,
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    llama,
    merged,
    mlx_deltas,
    peft_deltas,
    unet,
    write_peft,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
SITE = "model.layers.0.self_attn.q_proj.weight"
every_type = pytest.mark.parametrize("factors", ["int8", "int4"])


def _lora(folder: Path, rank: int = 3, **config: object) -> Path:
    tensors = {f"{Q}.lora_A.weight": draw(1, rank, 6), f"{Q}.lora_B.weight": draw(2, 6, rank)}
    return write_peft(folder, tensors, r=rank, lora_alpha=7, **config)


def _decoded(file: Path, key: str, group: int, bits: int, length: int, rank: int) -> np.ndarray:
    """A factor ``(length, rank)`` by the words of docs/formats.md alone."""
    import torch
    from safetensors.torch import load_file as load

    stored = load(file)
    codes, scales = stored[f"{key}.codes"], stored[f"{key}.scales"]
    assert scales.dtype is torch.bfloat16
    if bits == 4:
        values = [v - 16 if v > 7 else v for byte in codes[0].tolist() for v in (byte & 15, byte >> 4)]
    else:
        values = codes[0].reshape(-1).tolist()
    steps = np.repeat(scales[0].double().numpy(), group)[: length * rank]
    return (np.array(values[: length * rank]) * steps).reshape(length, rank)


@every_type
def test_the_file_is_what_the_documentation_says(tmp_path: Path, factors: str) -> None:
    source = _lora(tmp_path / "a")
    result = convert(source, "compact", output=tmp_path / "c", factors=factors)
    said = json.loads((tmp_path / "c/compact.json").read_text())
    assert (said["format"], said["version"], said["factors"]) == ("surgery-compact", 1, factors)
    (parameter,) = said["parameters"]
    assert parameter["path"] == SITE
    (record,) = parameter["updates"]
    assert (record["kind"], record["rank"], record["shape"], record["alpha"]) == ("LoRA", 3, [6, 6], 7)
    bits = int(factors[3:])
    a, b = (
        _decoded(tmp_path / "c/adapter.safetensors", f"{SITE}.{leaf}", said["group"], bits, 6, 3)
        for leaf in ("lora_A", "lora_B")
    )
    delta, want = record["scale"] * b @ a.T, peft_deltas(source)[SITE.removesuffix(".weight")]
    error = float(np.linalg.norm(delta - want) / np.linalg.norm(want))
    assert result.max_approximation == pytest.approx(error, rel=1e-6)
    (entry,) = result.entries
    assert entry.outcome == "approximated"
    assert entry.error == result.max_approximation < (0.02 if factors == "int8" else 0.2)


@every_type
def test_to_peft_and_mlx_exactly(tmp_path: Path, factors: str) -> None:
    base = llama(tmp_path / "base")
    convert(_lora(tmp_path / "a"), "compact", output=tmp_path / "c", factors=factors)
    one = convert(tmp_path / "c", "peft", output=tmp_path / "p")
    other = convert(tmp_path / "c", "mlx", output=tmp_path / "m", base=base)
    assert one.max_error == other.max_error == 0.0
    assert_close(mlx_deltas(tmp_path / "m"), peft_deltas(tmp_path / "p"))
    bits = merged(base, tmp_path / "c", tmp_path / "1")
    assert all(
        np.array_equal(value, bits[name]) for name, value in merged(base, tmp_path / "p", tmp_path / "2").items()
    )


def test_to_kohya_and_from_it_with_flat_names_and_parts(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    stem = "base_model.model.conv_in"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 3, 3, 3), f"{stem}.lora_B.weight": draw(2, 4, 2, 1, 1)}
    convert(write_peft(tmp_path / "a", tensors, r=2), "compact", output=tmp_path / "c")
    convert(tmp_path / "c", "kohya", output=tmp_path / "k.safetensors", base=base)
    convert(tmp_path / "k.safetensors", "compact", output=tmp_path / "flat")
    assert all(site.flat for site in read_adapter(tmp_path / "flat").updates)
    convert(tmp_path / "flat", "peft", output=tmp_path / "p", base=base)
    kept = load_file(tmp_path / "p/adapter_model.safetensors")
    assert kept[f"{stem}.lora_A.weight"].shape == (2, 3, 3, 3)
    flat = kohya_deltas(tmp_path / "k.safetensors")["lora_unet_conv_in"]
    assert_close({"conv_in": peft_deltas(tmp_path / "p")["conv_in"]}, {"conv_in": flat})


@pytest.mark.parametrize("case", ["sd1/mixed", "sd1/dora-in", "sd1/mid", "sdxl/mixed"])
def test_nothing_of_a_real_kohya_file_is_dropped(tmp_path: Path, case: str) -> None:
    """Differences of weights and biases, magnitudes of columns, several parts of a pipeline: nothing is dropped."""
    source = GOLDEN / "kohya" / case / "adapter.safetensors"
    result = convert(source, "compact", output=tmp_path / "c")
    assert {entry.outcome for entry in result.entries} <= {"exact", "approximated"}
    one, other = read_adapter(source), read_adapter(tmp_path / "c")
    assert one.updates.keys() == other.updates.keys()
    base = source.parents[1] / "base"
    before, after = (merged(base, path, tmp_path / f"merged-{path.name[:1]}") for path in (source, tmp_path / "c"))
    assert all(np.abs(before[n].astype(float) - after[n]).max() < 0.05 for n in before)


@pytest.mark.parametrize("case", ["mixtral/lora", "qwen3_moe/lora-switch", "llama/dora-embed", "llama/full"])
def test_a_real_mlx_folder_survives_the_round_trip(tmp_path: Path, case: str) -> None:
    source = GOLDEN / "mlx" / case
    convert(source, "compact", output=tmp_path / "c")
    back = convert(tmp_path / "c", "mlx", output=tmp_path / "m", base=source.parent / "base")
    assert {entry.outcome for entry in back.entries} <= {"exact", "folded"}
    one, other = (load_file(path / "adapters.safetensors") for path in (source, tmp_path / "m"))
    assert one.keys() == other.keys()
    assert {n: v.shape for n, v in one.items()} == {n: v.shape for n, v in other.items()}


def test_the_output_projection_inside_an_attention_module_keeps_its_nesting(tmp_path: Path) -> None:
    stem = "base_model.model.attention"
    tensors = {
        f"{stem}.lora_A.weight": draw(1, 2, 10),
        f"{stem}.lora_B.weight": draw(2, 30, 2),
        f"{stem}.base_layer.out_proj.lora_A.weight": draw(3, 2, 10),
        f"{stem}.base_layer.out_proj.lora_B.weight": draw(4, 10, 2),
    }
    convert(write_peft(tmp_path / "a", tensors, r=2, lora_alpha=6), "compact", output=tmp_path / "c")
    convert(tmp_path / "c", "peft", output=tmp_path / "p")
    assert load_file(tmp_path / "p/adapter_model.safetensors").keys() == tensors.keys()
    scales = [
        [u.scale for u in chain if isinstance(u, LoRA)] for chain in read_adapter(tmp_path / "p").updates.values()
    ]
    assert sorted(scales) == [[3.0], [6.0]]


def test_codes_are_copied_where_they_are_the_ones_asked_for(tmp_path: Path) -> None:
    convert(_lora(tmp_path / "a"), "compact", output=tmp_path / "b", factors="int4")
    result = convert(tmp_path / "b", "compact", output=tmp_path / "c", factors="int4")
    assert [entry.outcome for entry in result.entries] == ["exact"]
    for name in ("adapter.safetensors", "compact.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert [e.outcome for e in convert(tmp_path / "b", "compact", output=tmp_path / "d", factors="int8").entries] == [
        "approximated"
    ]


def test_what_belongs_to_the_training_survives(tmp_path: Path) -> None:
    source = _lora(tmp_path / "a", task_type="CAUSAL_LM", lora_dropout=0.1, base_model_name_or_path="org/model")
    (source / "tokenizer.json").write_text("{}")
    convert(source, "compact", output=tmp_path / "c")
    convert(tmp_path / "c", "peft", output=tmp_path / "p")
    config = config_of(tmp_path / "p")
    assert [config[key] for key in ("task_type", "lora_dropout", "base_model_name_or_path", "lora_alpha", "r")] == [
        "CAUSAL_LM",
        0.1,
        "org/model",
        7,
        3,
    ]
    assert (tmp_path / "p/tokenizer.json").read_text() == "{}"


def test_the_task_and_the_orientation_of_the_base_go_in_and_out(tmp_path: Path) -> None:
    """By the configuration that is carried along, or, where there is none that says so, by keys of their own."""
    source = read_adapter(_lora(tmp_path / "a", task_type="SEQ_CLS", fan_in_fan_out=True))
    assert (source.task, source.stored_transposed) == ("text-classification", True)
    for name, adapter in {"carried": source, "told": replace(source, format="other", config={})}.items():
        convert(adapter, "compact", output=tmp_path / name)
        written = json.loads((tmp_path / name / "compact.json").read_text())
        assert ("task" in written, "stored_transposed" in written) == (name == "told", name == "told")
        found = read_adapter(tmp_path / name)
        assert (found.task, found.stored_transposed) == ("text-classification", True)
        convert(found, "peft", output=tmp_path / f"{name}-peft")
        assert config_of(tmp_path / f"{name}-peft")["task_type"] == "SEQ_CLS"


def test_peft_loads_biases_norms_and_token_rows_that_went_through(tmp_path: Path) -> None:
    """What only PEFT's own folders could hold before is written for any source, and PEFT computes the same with it."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from tests.adapters.test_peft import _model

    options = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed_tokens": [1, 5]},
    }
    torch.manual_seed(1)
    tuned = get_peft_model(_model(), LoraConfig(r=4, init_lora_weights=False, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" not in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", "compact", output=tmp_path / "c")
    convert(tmp_path / "c", "peft", output=tmp_path / "p")
    ids = torch.tensor([[1, 2, 5, 9]])
    want = tuned(input_ids=ids).logits
    got = PeftModel.from_pretrained(_model(), str(tmp_path / "p"))(input_ids=ids).logits
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_a_writer_that_states_too_small_an_error_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = sys.modules["surgery.verbs.convert_adapter"]
    honest = room.format_to_write("compact")

    class Liar:
        single_file, name, coding = honest.single_file, honest.name, honest.coding
        read, detect = honest.read, honest.detect

        def render(self, adapter: object, base: object) -> object:
            rendering = honest.render(adapter, base)  # type: ignore[arg-type]
            off = [replace(t, load=_negated(t)) if t.name.endswith("lora_B.codes") else t for t in rendering.tensors]
            return replace(rendering, tensors=tuple(off))

    def _negated(tensor: NewTensor) -> Callable[[], Any]:
        return lambda: -tensor.load()

    monkeypatch.setattr(room, "format_to_write", lambda name: Liar())
    with pytest.raises(ProofError, match="its writer stated") as caught:
        convert(_lora(tmp_path / "a"), "compact", output=tmp_path / "c")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "c").exists()


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    source = _lora(tmp_path / "a")
    with pytest.raises(FitError, match="not as int8 codes"):
        convert(source, "mlx", output=tmp_path / "b", factors="int8")
    with pytest.raises(FitError, match="no type of factors 'int3'"):
        convert(source, "compact", output=tmp_path / "b", factors="int3")
    with pytest.raises(FitError, match="`factors=` chooses"):
        convert(source, "compact", output=tmp_path / "b", dtype="fp16")
    with pytest.raises(FitError, match="keeps names as they are"):
        convert(source, "compact", output=tmp_path / "b", projections="split")
    with pytest.raises(FitError, match="a dtype says nothing"):
        surgery.combine([(source, 2.0)], to="compact", output=tmp_path / "b", dtype="fp16")


def test_combined_and_resized_adapters_state_the_error_of_their_codes(tmp_path: Path) -> None:
    lora = EXAMPLES / "lora"
    convert(lora, "compact", output=tmp_path / "c", factors="int4")
    both = surgery.combine([(tmp_path / "c", 0.5), (lora, 1.0)], output=tmp_path / "both")
    assert {one.outcome for one in both.modules} == {"approximated"}
    assert both.error is not None
    assert 1e-4 < both.error < 0.01
    exact = surgery.combine([(tmp_path / "c", 0.5), (lora, 1.0)], output=tmp_path / "p", to="peft")
    assert exact.error is not None
    assert exact.error < 1e-6
    found = surgery.diff(tmp_path / "both", tmp_path / "p").as_json()
    assert found["same_structure"]
    small = surgery.resize(tmp_path / "c", rank=4, output=tmp_path / "small")
    assert {one.rank for one in small.modules} == {4}


def test_inspect_and_report_say_what_is_stored(tmp_path: Path) -> None:
    convert(EXAMPLES / "lora", "compact", output=tmp_path / "c", factors="int4")
    whole, small = (surgery.inspect(path) for path in (EXAMPLES / "lora", tmp_path / "c"))
    assert small.parameters == whole.parameters  # type: ignore[union-attr]
    assert list(small.dtypes) == ["I4"]  # type: ignore[union-attr]
    assert small.scales == whole.scales  # type: ignore[union-attr]
    assert small.dtypes["I4"].nbytes * 7 < whole.nbytes * 1.01  # type: ignore[union-attr]
    (cost,) = surgery.report([tmp_path / "c"], base=EXAMPLES / "base").adapters
    assert cost.nbytes == (tmp_path / "c/adapter.safetensors").stat().st_size
