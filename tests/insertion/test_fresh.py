# SPDX-License-Identifier: Apache-2.0
"""Fresh adapters without PEFT: the same bytes again, starts along data, other formats, what training takes, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery_formats.adapters.peft.fresh import spelt_targets
from tests.support.kit import HIDDEN, make_base
from tests.support.quantised_folders import quantise_folder
from tests.support.tiny_models import tiny

WEIGHTS = "adapter_model.safetensors"


def model_folder(folder: Path, model_type: str = "llama") -> Path:
    tiny(model_type).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["lora", "lokr", "oft", "vera", "prefix", "prompt", "bottleneck"])
def test_the_same_command_gives_the_same_bytes(kind: str, tmp_path: Path):
    base = model_folder(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    for name, seed in (("a", 1), ("b", 2), ("elsewhere/a", 1)):
        surgery.insert(base, new=kind, rank=8, seed=seed, output=tmp_path / name)
    weights = "adapter.safetensors" if kind == "bottleneck" else WEIGHTS
    for name in (weights, "adapter_config.json", "surgery_manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "elsewhere" / "a" / name).read_bytes()
    first, second = (list(load_file(tmp_path / name / weights).values()) for name in ("a", "b"))
    constant = kind in ("oft", "vera")  # the seed of a VeRA is in its configuration
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)) == constant


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"new": "lora"}, 'train it on its base: PeftModel.from_pretrained(model, "{out}", is_trainable=True)'),
        ({"new": "prompt"}, 'load_peft_weights("{out}"))'),
        ({"new": "bottleneck"}, 'model.train_adapter(model.load_adapter("{out}", use_safetensors=True))'),
        (
            {"new": "lora", "format": "mlx"},
            "mlx_lm.lora -c {out}/adapter_config.json --model BASE --train --data DATA ",
        ),
        ({"new": "lora", "init": "olora"}, 'path_initial_model_for_weight_conversion="{out}/initial" for a LoRA'),
    ],
)
def test_the_summary_ends_with_the_call_that_trains_it(options: dict[str, Any], call: str, tmp_path: Path):
    base, out = model_folder(tmp_path / "base"), tmp_path / "out"
    result = surgery.insert(base, **options, rank=8, output=out)
    (line,) = [line for line in str(result).splitlines() if line.startswith("next: ")]
    assert call.format(out=out) in line


def test_a_residual_base_is_what_the_adapter_is_trained_on(tmp_path: Path):
    base, left = model_folder(tmp_path / "base"), tmp_path / "left"
    result = surgery.insert(base, new="lora", init="olora", rank=8, residual=left, output=tmp_path / "out")
    assert f"next: train it on {left}: PeftModel.from_pretrained" in str(result)


def test_factors_against_the_rounding_of_a_quantised_base(tmp_path: Path):
    """What is left of it is what the best factors of that rank leave, and a merge with the release says the same."""
    release = model_folder(tmp_path / "release")
    base = quantise_folder(release, tmp_path / "base", "nf4")
    result = surgery.insert(base, new="lora", rank=4, alpha=6, init="loftq", release=release, output=tmp_path / "new")
    surgery.merge(base, tmp_path / "new", output=tmp_path / "merged", dtype="fp32")
    surgery.merge(base, model_free(tmp_path / "zero", base), output=tmp_path / "plain", dtype="fp32")
    exact, near, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("release", "merged", "plain"))
    assert len(result.errors) == 8
    for module, (before, after) in result.errors.items():
        weight = exact[f"{module}.weight"]
        lost = weight - rounded[f"{module}.weight"]
        best = torch.linalg.svdvals(lost.double())[4:].norm() / weight.norm()
        assert before == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-4)
        assert after == pytest.approx(float(best), rel=1e-3)
        assert after == pytest.approx(float((weight - near[f"{module}.weight"]).norm() / weight.norm()), rel=1e-3)
    assert "of a weight at most" in str(result)


def model_free(folder: Path, base: Path) -> Path:
    """An adapter that adds next to nothing, so that a merge shows what the codes stand for."""
    surgery.insert(base, new="lora", rank=4, output=folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t if "lora_A" in n else torch.full_like(t, 1e-30) for n, t in tensors.items()}, folder / WEIGHTS)
    return folder


def test_factors_along_the_inputs_of_modules(tmp_path: Path):
    base = make_base(tmp_path / "base")
    torch.manual_seed(2)
    rows = torch.randn(200, HIDDEN) * torch.logspace(0, -2, HIDDEN)
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"]
    save_file({f"{name}.activations": rows.clone() for name in names}, tmp_path / "inputs.safetensors")
    surgery.insert(
        base, new="lora", rank=4, init="eva", calibration=tmp_path / "inputs.safetensors", output=tmp_path / "new"
    )
    held = load_file(tmp_path / "new" / WEIGHTS)
    wanted = torch.linalg.svd(rows.double(), full_matrices=False)[2][:4]
    for name, tensor in held.items():
        if "lora_A" in name:
            assert torch.allclose((tensor.double() @ wanted.T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-4)
        else:
            assert not tensor.any()
    with pytest.raises(surgery.FitError, match="no inputs of"):
        surgery.insert(
            base,
            new="lora",
            init="eva",
            targets="all",
            calibration=tmp_path / "inputs.safetensors",
            output=tmp_path / "no",
        )


def test_a_gram_matrix_gives_the_same_start(tmp_path: Path):
    base = make_base(tmp_path / "base")
    torch.manual_seed(2)
    rows = torch.randn(200, HIDDEN) * torch.logspace(0, -1, HIDDEN)
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.activations": rows}, tmp_path / "rows.safetensors")
    save_file({f"{name}.gram": rows.T @ rows / 200}, tmp_path / "gram.safetensors")
    for kind in ("rows", "gram"):
        file = tmp_path / f"{kind}.safetensors"
        surgery.insert(
            base,
            new="lora",
            rank=4,
            init="eva",
            targets="layers.0.self_attn.q_proj",
            calibration=file,
            output=tmp_path / kind,
        )
    first, second = (load_file(tmp_path / kind / WEIGHTS) for kind in ("rows", "gram"))
    assert len(first) == 2
    for key, tensor in first.items():
        assert torch.allclose(tensor.abs(), second[key].abs(), atol=1e-4)


def test_a_residual_of_a_quantised_base_is_written_in_16_bits(tmp_path: Path):
    base = quantise_folder(model_folder(tmp_path / "release"), tmp_path / "base", "nf4")
    with pytest.raises(surgery.FitError, match="these are codes"):
        surgery.insert(base, new="lora", rank=4, init="pissa", output=tmp_path / "new")
    result = surgery.insert(base, new="lora", rank=4, init="pissa", output=tmp_path / "new", residual=tmp_path / "rest")
    rest = surgery.open(tmp_path / "rest")
    assert not rest.is_quantised
    assert {parameter.storage.dtype.bits for parameter in rest.main.parameters.values()} <= {16, 32}
    assert 0 < max(error for (error,) in result.errors.values()) < 5e-3


def test_a_prompt_begins_as_a_text(tmp_path: Path):
    base = model_folder(tmp_path / "base")
    words = {"[UNK]": 0, "name": 5, "the": 9, "feeling": 17}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(base / "tokenizer.json"))
    surgery.insert(base, new="prompt", rank=5, text="name the feeling", output=tmp_path / "new")
    table = load_file(tmp_path / "new" / WEIGHTS)["prompt_embeddings"]
    rows = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table, rows[[5, 9, 17, 5, 9]])


@pytest.mark.parametrize("form", ["mlx", "adapterhub"])
def test_other_formats_hold_the_same_lora(form: str, tmp_path: Path):
    base = model_folder(tmp_path / "base")
    options = {"new": "lora", "rank": 4, "targets": "q_proj,v_proj,up_proj", "seed": 5}
    surgery.insert(base, format=form, output=tmp_path / form, **options)
    surgery.insert(base, output=tmp_path / "peft", **options)
    assert surgery.open(tmp_path / form).format == form
    assert surgery.diff(tmp_path / form, tmp_path / "peft", base=base).equal


def test_what_a_format_lacks_is_refused(tmp_path: Path):
    base = model_folder(tmp_path / "base")
    with pytest.raises(surgery.FitError, match="adapterhub cannot hold") as caught:
        surgery.insert(base, new="lora", format="adapterhub", output=tmp_path / "no")
    assert "targets" in str(caught.value.hint)
    assert not (tmp_path / "no").exists()


def test_a_bottleneck_is_read_back_with_what_it_is(tmp_path: Path):
    base = model_folder(tmp_path / "base", "bert")
    result = surgery.insert(base, new="bottleneck", rank=8, output=tmp_path / "new")
    opened = surgery.open(tmp_path / "new")
    assert (opened.format, opened.kind, opened.parameters) == ("adapterhub", "BOTTLENECK", result.trained)
    held = load_file(tmp_path / "new" / "adapter.safetensors")
    assert result.trained == 2 * (2 * 8 * 32 + 8 + 32) == sum(tensor.numel() for tensor in held.values())
    assert {name.partition(".adapters.")[0] for name in held} == {f"bert.encoder.layer.{n}.output" for n in (0, 1)}
    assert not any(tensor.any() for name, tensor in held.items() if "adapter_up" in name)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["config"]["reduction_factor"], config["hidden_size"]) == (4, 32)


def measured_step(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> int:
    """Bytes of every tensor that outlives a step of AdamW: parameters, buffers, gradients and moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    model(**given, labels=given["input_ids"]).loss.backward()
    optimiser.step()
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    held += [state for some in optimiser.state.values() for state in some.values() if torch.is_tensor(state)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_training_is_that_of_a_step(kind: str, dtype: torch.dtype, tmp_path: Path):
    import peft

    config = LlamaConfig(
        vocab_size=2000, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "base")
    result = surgery.insert(tmp_path / "base", new=kind, rank=64, targets="all", output=tmp_path / "new")
    given = {"input_ids": torch.randint(0, 2000, (2, 16))}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    whole = measured_step(LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), given)
    attached = peft.PeftModel.from_pretrained(model, tmp_path / "new", is_trainable=True)
    assert result.memory.nbytes == pytest.approx(measured_step(attached, given), rel=0.15)
    assert result.full.nbytes == pytest.approx(whole, rel=0.15)


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path):
    base = model_folder(tmp_path / "base")
    said = surgery.insert(base, new="lora", targets="all", dry_run=True)
    done = surgery.insert(base, new="lora", targets="all", output=tmp_path / "new")
    assert (said.trained, said.memory, said.targets) == (done.trained, done.memory, done.targets)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "new"}


def test_targets_are_spelt_as_shortly_as_they_can_be():
    paths = [
        "a.0.q",
        "a.0.out",
        "a.1.q",
        "a.1.out",
        "a.0.mlp.out",
        "a.1.mlp.out",
        "a",
        "a.0",
        "a.1",
        "a.0.mlp",
        "a.1.mlp",
    ]
    assert spelt_targets(["a.0.q", "a.1.q"], paths) == ("q",)
    assert spelt_targets(["a.0.mlp.out", "a.1.mlp.out"], paths) == ("mlp.out",)
    assert spelt_targets(["a.0.out", "a.1.out"], paths) == ("0.out", "1.out")
    assert spelt_targets(["a.0.q"], paths) == ("0.q",)


def test_a_manifest_is_applied_again(tmp_path: Path):
    base = model_folder(tmp_path / "base")
    surgery.insert(base, new="lora", rank=4, init="pissa", targets="all", seed=9, output=tmp_path / "new")
    surgery.apply(tmp_path / "new" / "surgery_manifest.json", inputs={"model": base}, output=tmp_path / "again")
    for path in (tmp_path / "new").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "new")).read_bytes()


REFUSED = {
    "no way to begin": {"new": "lora", "init": "magic"},
    "no kind of adapter": {"new": "lorra"},
    "a way to begin a LoRA": {"new": "ia3", "init": "pissa"},
    "a DoRA measures": {"new": "dora", "init": "pissa"},
    "needs a file of them": {"new": "lora", "init": "eva"},
    "names it": {"new": "lora", "init": "loftq"},
    "only pissa and olora": {"new": "lora", "residual": "rest"},
    "halves the rank": {"new": "lora", "init": "orthogonal", "rank": 3},
    "more than a side": {"new": "lora", "init": "pissa", "rank": 33},
    "no linear module matches 'q_prok'": {"new": "lora", "targets": "q_prok"},
    "do not divide the inputs": {"new": "oft", "rank": 5},
    "written in the format adapterhub": {"new": "bottleneck", "format": "peft"},
    "no raw pissa": {"new": "lora", "init": "pissa", "format": "mlx"},
    "is at least 1": {"new": "lora", "rank": 0},
    "rank is 1000000000, and at most 1048576": {"new": "prompt", "rank": 10**9},
    "seed is 9223372036854775808; it is at most": {"new": "vera", "seed": 2**63},
    "not a positive number": {"new": "lora", "alpha": -1.0},
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals(said: str, tmp_path: Path):
    base = make_base(tmp_path / "base")
    with pytest.raises(surgery.FitError) as caught:
        surgery.insert(base, output=tmp_path / "out", **REFUSED[said])
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "out").exists()


def test_a_dora_of_a_row_of_zeros_is_refused(tmp_path: Path):
    """Its length divides; PEFT's layer gives NaN."""
    base = make_base(tmp_path / "base", torch.float32)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(surgery.FitError, match=r"a row of 'model.layers.0.self_attn.q_proj' is zero"):
        surgery.insert(base, new="dora", rank=2, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_are_not_begun(tmp_path: Path):
    base = model_folder(tmp_path / "base", "mixtral")
    with pytest.raises(surgery.FitError, match="its experts are stacked parameters"):
        surgery.insert(base, new="lora", targets="all", output=tmp_path / "out")
    surgery.insert(base, new="lora", output=tmp_path / "out")


def test_a_failed_residual_leaves_nothing(tmp_path: Path):
    base = make_base(tmp_path / "base")
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest" / "mine").write_text("kept")
    with pytest.raises(surgery.OutputExistsError):
        surgery.insert(base, new="lora", init="pissa", output=tmp_path / "new", residual=tmp_path / "rest")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("ia3", {"rank": 4}),
        ("oft", {"alpha": 2}),
        ("vera", {"alpha": 2}),
        ("prompt", {"targets": "mlp"}),
        ("bottleneck", {"targets": "all"}),
    ],
)
def test_what_a_kind_has_no_use_for_is_refused(kind: str, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(surgery.UsageError, match=f"^{name} has no meaning for the kind {kind}"):
        surgery.insert("examples/base", new=kind, dry_run=True, **option)


@pytest.mark.parametrize(
    ("kind", "said"), [("ia3", "ia3, init"), ("oft", "blocks of 16"), ("bottleneck", "width 16"), ("vera", "rank 16")]
)
def test_a_kind_says_what_its_rank_is(kind: str, said: str) -> None:
    assert said in surgery.insert("examples/base", new=kind, dry_run=True).summary().as_text()
