# SPDX-License-Identifier: Apache-2.0
"""The reference with virtual tokens, trained keys and values, merged weights, and 16-bit stored types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.engine.merge.merge_plan import plan_merge
from surgery.reference import Cache, forward, greedy, open_reference, prompt_cache
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.arrays import as_torch
from surgery_formats.binding.bind import bind
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes

LIMIT = 1e-4
TOKENS = 5
MODELS = ["llama", "llama_llama3", "qwen2", "gemma2", "gpt2", "opt", "smollm3", "mistral_short_window"]


def _ids(rows: int = 1, columns: int = 11) -> torch.Tensor:
    return torch.randint(4, recipes.VOCAB, (rows, columns), generator=torch.Generator().manual_seed(5))


def _prompted(name: str, folder: Path, config: Any) -> tuple[Any, torch.Tensor]:
    """A PEFT model with a random prompt, and the one tensor its file holds."""
    torch.manual_seed(1)
    model = peft.get_peft_model(recipes.load(name, folder), config).eval()
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder / "adapter")
    return model, load_file(folder / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prompt_tuning_matches_peft(name: str, tmp_path: Path) -> None:
    recipes.build(name, tmp_path)
    model, embeddings = _prompted(
        name, tmp_path, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    )
    reference, ids = open_reference(open_checkpoint(tmp_path).main), _ids()
    theirs = model(input_ids=ids).logits
    together = forward(reference, ids, virtual=embeddings)
    assert float((together.logits - theirs).abs().max()) <= LIMIT
    after = forward(reference, ids, past=prompt_cache(reference, embeddings))
    assert float((after.logits - theirs[:, TOKENS:]).abs().max()) <= LIMIT
    made = greedy(reference, ids, 6, past=prompt_cache(reference, embeddings)).tokens
    assert torch.equal(made, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_prefix_tuning_matches_peft(name: str, tmp_path: Path) -> None:
    recipes.build(name, tmp_path)
    model, _ = _prompted(name, tmp_path, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    prompt = read_adapter(tmp_path / "adapter").prompt
    assert prompt is not None
    assert prompt.prefix is not None
    layers = [prompt.key_values(layer) for layer in range(prompt.prefix.layers)]
    reference, ids = open_reference(open_checkpoint(tmp_path).main), _ids()
    kept = tuple((as_torch(key)[None], as_torch(value)[None]) for key, value in layers)
    past = Cache(kept, torch.ones(1, TOKENS, dtype=torch.bool))
    ours, theirs = forward(reference, ids, past=past).logits, model(input_ids=ids).logits
    assert float((ours - theirs).abs().max()) <= LIMIT
    batch, real = _ids(3), torch.ones(3, 11, dtype=torch.long)
    real[1, 7:] = real[2, 3:] = 0
    rows = forward(reference, batch, real=real, past=past.expand(3)).logits
    for row in range(3):
        alone = forward(reference, batch[row][real[row].bool()][None], past=past).logits[0]
        assert float((rows[row][real[row].bool()] - alone).abs().max()) <= LIMIT


@torch.no_grad()
def test_virtual_tokens_of_encoders_match_peft(tmp_path: Path) -> None:
    for name in ("bert_sequence", "roberta_sequence"):
        folder = recipes.build(name, tmp_path / name)
        model, embeddings = _prompted(
            name, folder, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=TOKENS)
        )
        reference, ids = open_reference(open_checkpoint(folder).main), _ids(2)
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert float((forward(reference, ids, virtual=embeddings).logits - theirs).abs().max()) <= LIMIT


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_merge_in_memory_equals_the_merge_on_disk(adapter: str, tmp_path: Path) -> None:
    base = open_checkpoint("examples/base")
    plan = plan_merge(bind([(read_adapter(f"examples/{adapter}"), 0.7)], base))
    ids = _ids()
    ours = forward(open_reference(base.main, plan), ids).logits
    surgery.merge("examples/base", (f"examples/{adapter}", 0.7), output=tmp_path / "merged")
    written = forward(open_reference(open_checkpoint(tmp_path / "merged").main), ids).logits
    assert torch.equal(ours, written)
    assert float((ours - forward(open_reference(base.main), ids).logits).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bit_weights_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = recipes.build("qwen3", tmp_path, dtype=dtype)
    ids = _ids()
    theirs = recipes.load("qwen3", folder)(ids).logits
    component = open_checkpoint(folder).main
    assert float((forward(open_reference(component), ids).logits - theirs).abs().max()) <= LIMIT
    exact = forward(open_reference(component, dtype=torch.float64), ids).logits
    assert exact.dtype is torch.float64
    assert float((exact - theirs).abs().max()) <= LIMIT


@torch.no_grad()
def test_gemma_scales_by_a_rounded_number_and_granite_does_not(tmp_path: Path) -> None:
    for name, factor in (("gemma", torch.tensor(32**0.5).bfloat16()), ("granite", torch.tensor(2.9))):
        folder = recipes.build(
            name, tmp_path / name, dtype=torch.bfloat16, **({} if name == "gemma" else {"embedding_multiplier": 2.9})
        )
        component = open_checkpoint(folder).main
        row = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][7].float()
        recipe = open_reference(component).model.embedding
        assert recipe.scale_rounded is (name == "gemma")
        model = recipes.load(name, folder, torch.bfloat16)
        seen: list[torch.Tensor] = []
        model.model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(torch.tensor([[7]]))
        assert torch.equal(seen[0][0, 0], (row * factor.float()).bfloat16())


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    reference = open_reference(open_checkpoint("examples/base").main)
    vocabulary = json.loads(Path("examples/base/config.json").read_text())["vocab_size"]
    with pytest.raises(FitError, match="vocabulary"):
        forward(reference, torch.tensor([[vocabulary]]))
    with pytest.raises(FitError, match="vocabulary"):
        forward(reference, torch.tensor([[-1]]))
