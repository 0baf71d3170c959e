# SPDX-License-Identifier: Apache-2.0
"""PEFT loads every fresh adapter: it leaves the base as it is, trains, and counts what it trains as we do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import surgery
from tests.support.tiny_models import inputs, output, tiny

KINDS = ("lora", "dora", "rslora", "ia3", "loha", "lokr", "oft", "vera")
TYPES = ("llama", "bert", "gpt2", "t5", "vit", "phi3")
MORE_TYPES = (
    *(
        "gpt_neox",
        "bloom",
        "opt",
        "qwen2_vl",
        "clip",
        "whisper",
        "deit",
        "distilbert",
        "electra",
        "gemma3_text",
        "falcon",
    ),
    *("llava", "mllama"),
)
STARTS = ("default", "pissa", "olora", "orthogonal")


@contextmanager
def strictly() -> Iterator[None]:
    """PEFT warns of keys that it misses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*unexpected.*")
        yield


def opened(base: tuple[str, Path]) -> Any:
    return type(tiny(base[0])).from_pretrained(base[1]).eval()


def attached(base: tuple[str, Path], adapter: Path) -> Any:
    with strictly():
        return peft.PeftModel.from_pretrained(opened(base), adapter, is_trainable=True).eval()


def step(model: Any, given: dict[str, torch.Tensor]) -> set[str]:
    """Train for one step; the names of the tensors that changed."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    found = model(**given)
    first = found.logits if "logits" in found else found.last_hidden_state
    first.float().square().mean().backward()
    optimiser.step()
    return {name for name, parameter in trained.items() if not torch.equal(parameter, before[name])}


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model whose singular values fall off, as those of trained models do: where they are equal, PEFT's float32 finds others."""
    folder = tmp_path_factory.mktemp("base") / request.param
    model = tiny(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                U, S, V = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(U * (S[0] * 0.9 ** torch.arange(len(S))) @ V)
    model.save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("base", TYPES, indirect=True)
@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_trains(base: tuple[str, Path], targets: str, kind: str, tmp_path: Path):
    model_type, folder = base
    if model_type == "gpt2" and kind in ("loha", "lokr", "oft"):
        with pytest.raises(surgery.FitError, match=f"PEFT has no {kind} on layers"):
            surgery.insert(folder, new=kind, rank=8, targets=targets, output=tmp_path / "new")
        return
    rank = None if kind == "ia3" else 8
    result = surgery.insert(folder, new=kind, rank=rank, targets=targets, output=tmp_path / "new", seed=3)
    plain = opened(base)
    given = inputs(plain)
    wanted = output(plain, given)
    model = attached(base, tmp_path / "new")
    assert torch.allclose(output(model, given), wanted, atol=1e-5, rtol=1e-5)
    trained, total = model.get_nb_trainable_parameters()
    assert (result.trained, result.parameters + result.trained) == (trained, total)
    assert step(model, given)


@pytest.mark.parametrize("base", MORE_TYPES, indirect=True)
def test_all_linear_modules_of_many_types_are_found_by_peft(base: tuple[str, Path], tmp_path: Path):
    """With neither factor zero: one that PEFT misses would stay as PEFT made it, and its B zero."""
    result = surgery.insert(base[1], new="lora", rank=4, init="orthogonal", targets="all", output=tmp_path / "new")
    plain = opened(base)
    given = inputs(plain)
    model = attached(base, tmp_path / "new")
    assert torch.allclose(output(model, given), output(plain, given), atol=1e-5, rtol=1e-5)
    assert result.trained == model.get_nb_trainable_parameters()[0]
    sides = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(sides) == result.modules
    assert all(side.abs().max() > 0 for side in sides)


@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("init", STARTS)
def test_every_start_of_a_lora_is_the_base(base: tuple[str, Path], init: str, tmp_path: Path):
    model_type, folder = base
    if (model_type, init) == ("gpt2", "olora"):
        with pytest.raises(surgery.FitError, match="PEFT cannot take olora from layers"):
            surgery.insert(folder, new="lora", rank=8, init=init, targets="all", output=tmp_path / "new")
        return
    surgery.insert(folder, new="lora", rank=8, alpha=12, init=init, targets="all", output=tmp_path / "new")
    plain = opened(base)
    given = inputs(plain)
    model = attached(base, tmp_path / "new")
    assert torch.allclose(output(model, given), output(plain, given), atol=1e-5, rtol=1e-5)
    assert step(model, given)
    assert not torch.allclose(output(model, given), output(plain, given), atol=1e-3)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_trained_becomes_a_lora_of_the_base(base: tuple[str, Path], init: str, tmp_path: Path):
    """By PEFT's own conversion, of the folder that was written for it; and by `combine`, which subtracts it too."""
    _, folder = base
    result = surgery.insert(folder, new="lora", rank=4, init=init, output=tmp_path / "new")
    given = inputs(opened(base))
    model = attached(base, tmp_path / "new")
    step(model, given)
    wanted = output(model, given)
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(result.convertible))
    again = attached(base, tmp_path / "lora")
    assert torch.allclose(output(again, given), wanted, atol=1e-5, rtol=1e-4)
    surgery.merge(folder, tmp_path / "trained", output=tmp_path / "merged")
    merged = type(opened(base)).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(output(merged, given), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_residual_base_with_the_factors_is_the_base(base: tuple[str, Path], init: str, tmp_path: Path):
    _, folder = base
    result = surgery.insert(
        folder,
        new="lora",
        rank=4,
        alpha=6,
        init=init,
        targets="all",
        output=tmp_path / "new",
        residual=tmp_path / "rest",
    )
    plain = opened(base)
    given = inputs(plain)
    rest = type(plain).from_pretrained(tmp_path / "rest").eval()
    assert not torch.allclose(output(rest, given), output(plain, given), atol=1e-3)
    with strictly():
        model = peft.PeftModel.from_pretrained(rest, tmp_path / "new", is_trainable=True).eval()
    assert torch.allclose(output(model, given), output(plain, given), atol=1e-5, rtol=1e-5)
    assert max(error for (error,) in result.errors.values()) < 1e-6


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"], indirect=True)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_load_and_train(base: tuple[str, Path], kind: str, tmp_path: Path):
    model_type, folder = base
    if (model_type, kind) == ("t5", "prefix"):
        with pytest.raises(surgery.FitError, match="an encoder and a decoder"):
            surgery.insert(folder, new=kind, output=tmp_path / "new")
        return
    result = surgery.insert(folder, new=kind, rank=5, output=tmp_path / "new")
    config = peft.PeftConfig.from_pretrained(tmp_path / "new")
    config.inference_mode = False  # PEFT trains no prompt that it loads as a whole
    model = peft.get_peft_model(opened(base), config).eval()
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path / "new"))
    assert result.trained == model.get_nb_trainable_parameters()[0]
    table = model.get_prompt_embedding_to_save("default")
    if kind == "prompt":
        rows = opened(base).get_input_embeddings().weight
        assert all((row == rows).all(1).any() for row in table)
    assert step(model, inputs(opened(base)))
