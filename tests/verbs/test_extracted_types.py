# SPDX-License-Identifier: Apache-2.0
"""What is extracted, PEFT attaches to the base as transformers loads it, and it then gives the tuned model's logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgery
from tests.support.tiny_models import causal_types, multimodal_types, tiny

SOME = (
    *("afmoe", "aria", "deepseek_v3", "gemma3", "gpt_oss", "granitemoe", "hrm_text", "inkling2_text", "jamba"),
    *("jetmoe", "kimi_k25", "laguna", "llava", "longcat_flash", "mamba", "nemotron_h", "phimoe", "qwen3_5_moe"),
)
"""Types that stand for the ways in which names on disk, the class's modules and what PEFT can attach to differ."""

_SMALLEST = 223
"""Types of which a tiny model can be made with the installed transformers, at the least."""


NOT_ATTACHED = {
    "diffusion_gemma": "refused: encoder and decoder share layers",
    "molmo2": "refused: a projection is split by sizes that only the model's code has",
    "mistral_large4": "refused: PEFT 0.21 renames factors of its experts twice",
}
"""Types of which PEFT does not attach what changed in this test: the list can only shrink."""


def _tune(model: Any) -> None:
    """Change every linear layer and every expert by rank 2."""
    generator = torch.Generator().manual_seed(3)

    def low_rank(*shape: int) -> torch.Tensor:
        *count, out, inputs = shape
        left, right = (torch.randn(*count, *size, generator=generator) for size in ((out, 2), (2, inputs)))
        return left @ right * 0.02

    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        head = module is model.get_output_embeddings()
        linear = isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D) and parameter.dim() == 2
        stack = parameter.dim() == 3 and ("expert" in name or "moe" in name) and not isinstance(module, torch.nn.Conv1d)
        if (linear and not head) or stack:
            parameter.data += low_rank(*parameter.shape)


def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)  # a model of diffusion draws
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


class _Unsaved(Exception):
    """transformers does not load what it saved."""


def _loaded(made: Any, folder: Path) -> Any:
    """A model as transformers saved it, before anything of ours has run."""
    model, info = made.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise _Unsaved(f"transformers does not find {info['missing_keys']}")
    return model.eval()


def _attached(base: Any, adapter: Path) -> Any:
    """The base with an adapter of which PEFT misses nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = peft.PeftModel.from_pretrained(base, adapter).eval()
    if missing := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
        raise AssertionError(missing[0])
    return attached


def _difference(
    model_type: str,
    folder: Path,
    change: Callable[[Path], Path] = lambda folder: folder / "lora",
    tune: Callable[[Any], None] = _tune,
    rank: int = 2,
) -> float:
    """The greatest difference of the attached model's logits from the tuned, as a share of the tuning's effect.

    Args:
        model_type: Of the model.
        folder: For files.
        change: Makes another adapter of the extracted one.
        tune: Changes the model.
        rank: Of the extraction.
    """
    model = tiny(model_type)
    _logits(model)
    model.save_pretrained(folder / "base")
    tune(model)
    model.save_pretrained(folder / "tuned")
    made = type(model)
    base, wanted = _loaded(made, folder / "base"), _logits(_loaded(made, folder / "tuned"))
    without = _logits(base)
    surgery.extract_lora(folder / "base", folder / "tuned", output=folder / "lora", rank=rank, kind="lora")
    attached = _attached(base, change(folder))
    return float((_logits(attached) - wanted).abs().max() / (wanted - without).abs().max())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("model_type", SOME)
def test_peft_attaches_what_was_extracted(model_type: str, tmp_path: Path) -> None:
    assert _difference(model_type, tmp_path) < 1e-3


def _tune_biases(model: Any) -> None:
    """Change biases too, those of experts among them."""
    _tune(model)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if name.endswith(("proj_bias", "_proj.bias", "norm.weight")):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05


def test_experts_with_biases_become_factors_and_are_not_copied(tmp_path: Path) -> None:
    assert _difference("gpt_oss", tmp_path, tune=_tune_biases, rank=4) < 1e-3
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert not any("experts" in name for name in config["modules_to_save"])
    assert {name.rpartition(".")[2] for name in config["target_parameters"]} == {
        *("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    }


def _tune_vocabulary(model: Any) -> None:
    """Change the token embedding, and the head where it is another matrix."""
    generator = torch.Generator().manual_seed(9)
    for matrix in {
        id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }.values():
        matrix.data += torch.randn(matrix.shape, generator=generator) * 0.02


@pytest.mark.parametrize("model_type", ["aria", "aya_vision", "gemma3", "llava", "paligemma", "qwen2_5_vl"])
def test_the_vocabulary_of_a_composite_is_known_under_the_names_on_disk(model_type: str, tmp_path: Path) -> None:
    assert _difference(model_type, tmp_path, tune=_tune_vocabulary, rank=64) < 1e-3


def _combined(folder: Path) -> Path:
    halves = [(folder / "lora", 0.5), (folder / "lora", 0.5)]
    surgery.combine(halves, output=folder / "halves", base=folder / "base")
    return folder / "halves"


def _by_mlx(folder: Path) -> Path:
    surgery.convert(folder / "lora", "mlx", output=folder / "mlx", base=folder / "base")
    surgery.convert(folder / "mlx", "peft", output=folder / "back", base=folder / "base")
    return folder / "back"


@pytest.mark.parametrize("change", [_combined, _by_mlx])
@pytest.mark.parametrize(
    "model_type", ["aria", "deepseek_v3", "granitemoe", "inkling2_text", "llava", "qwen3_5_moe", "solar_open"]
)
def test_peft_attaches_what_was_combined_or_converted(
    model_type: str, change: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert _difference(model_type, tmp_path, change) < 1e-3


def test_layers_that_encoder_and_decoder_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.SurgeryError, match="the encoder has it too"):
        _difference("diffusion_gemma", tmp_path)


def test_experts_whose_factors_peft_renames_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.SurgeryError, match="PEFT renames factors of these experts"):
        _difference("mistral_large4", tmp_path)


@pytest.mark.slow
def test_peft_attaches_what_was_extracted_from_every_type(tmp_path: Path) -> None:
    right: list[str] = []
    wrong: dict[str, str] = {}
    unmade: dict[str, str] = {}
    for model_type in sorted({*causal_types(), *multimodal_types()}):
        folder = tmp_path / model_type
        try:
            difference = _difference(model_type, folder)
        except _Unsaved as error:
            unmade[model_type] = str(error)
        except Exception as error:  # transformers cannot make, run or save so small a model of this type
            (wrong if (folder / "tuned").exists() else unmade)[model_type] = str(error)[:200]
        else:
            if difference < 1e-3:
                right.append(model_type)
            else:
                wrong[model_type] = f"{difference:.1e}"
    print(f"right: {len(right)}", *right)
    print(f"no tiny model: {len(unmade)}", *unmade)
    assert set(wrong) <= NOT_ATTACHED.keys(), wrong
    assert len(right) >= _SMALLEST
