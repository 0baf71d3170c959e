# SPDX-License-Identifier: Apache-2.0
"""Train the example: a small language model of Python code, and five ways to make it write documentation.

    python examples/train.py --out new-example --device cuda

trains a Llama of 1.5 M parameters on the standard library (``base/``), then, each from the base as it was saved,
a full fine-tune (``tuned/``), a LoRA, a DoRA and a soft prompt for the target text. After every tenth of a stage
the loss on development texts is taken and the best state is kept. Held-out texts are written, never read, here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import load_corpus
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from saving import BASE_NAME, save_adapter, save_model, train_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["Stage", "fit", "main"]

CONTEXT = 512  # tokens of a training window, its first special token included
VOCABULARY = 1536
PROMPT_TOKENS = 16
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGET_PARTS = ("target_train", "docstrings", "docstrings", "docstrings")  # a quarter is language reference
STAGES = ("base", "tuned", "lora", "dora", "prompt")


@dataclass(frozen=True)
class Stage:
    """How one model is trained."""

    steps: int
    batch: int  # windows
    peak: float  # learning rate
    decay: float = 0.0  # AdamW's, on matrices only


RECIPES = {
    "base": Stage(steps=4000, batch=64, peak=4e-3, decay=0.1),
    "tuned": Stage(steps=300, batch=32, peak=1e-3, decay=0.1),
    "lora": Stage(steps=400, batch=32, peak=3e-3),
    "dora": Stage(steps=400, batch=32, peak=3e-3),
    "prompt": Stage(steps=500, batch=32, peak=1e-2),
}


def _stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts as one row of token ids, each ended by the end token."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)])


def _windows(stream: Tensor, starts: Tensor, bos: int) -> Tensor:
    """``(len(starts), CONTEXT)`` token ids: the begin token, then the stream from each start."""
    offsets = torch.arange(CONTEXT - 1, device=stream.device)
    return torch.nn.functional.pad(stream[starts[:, None] + offsets], (1, 0), value=bos)


def _loss(model: Any, batch: Tensor) -> Tensor:
    """Mean loss in nats over all tokens of ``batch`` but the first of each row."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits[:, -CONTEXT:-1]  # behind a soft prompt, if any
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _development_loss(model: Any, stream: Tensor, bos: int) -> float:
    """Mean loss over up to 128 windows spread evenly over the stream."""
    model.eval()
    starts = torch.linspace(0, len(stream) - CONTEXT, min(128, len(stream) // CONTEXT)).long().to(stream.device)
    with torch.no_grad():
        total = sum(_loss(model, _windows(stream, part, bos)) * len(part) for part in starts.split(32))
    model.train()
    return float(total / len(starts))


def fit(model: Any, stage: Stage, train: Sequence[Tensor], dev: Tensor, bos: int, seed: int) -> list[dict[str, float]]:
    """Train in place and leave the state that was best on ``dev``; all streams have equal shares."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in weights.values() if p.ndim >= 2], "weight_decay": stage.decay},
        {"params": [p for p in weights.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.peak, betas=(0.9, 0.95), fused=dev.is_cuda)
    warmup = max(1, min(200, stage.steps // 10))

    def rate(step: int) -> float:
        done = (step - warmup) / max(1, stage.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    share = (stage.steps, stage.batch // len(train))  # windows of each stream in each step
    draws = [
        (s, (torch.rand(share, generator=generator, dtype=torch.float64) * (len(s) - CONTEXT)).long().to(s.device))
        for s in train
    ]
    best, best_state = math.inf, {}
    log: list[dict[str, float]] = []
    every, begun = max(1, stage.steps // 10), time.monotonic()
    model.train()
    for step in range(1, stage.steps + 1):
        parts = [_windows(stream, starts[step - 1], bos) for stream, starts in draws]
        loss = _loss(model, torch.cat(parts))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == stage.steps:
            value = _development_loss(model, dev, bos)
            seconds = time.monotonic() - begun
            log.append({"step": step, "train": float(loss.detach()), "dev": value, "seconds": round(seconds, 1)})
            print("   " + "  ".join(f"{k} {v:.4g}" for k, v in log[-1].items()), flush=True)
            if value < best:
                best, best_state = value, {name: p.detach().clone() for name, p in weights.items()}
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(best_state[name])
    return log


def _new_base(tokenizer: Any) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _with_adapter(model: Any, name: str, first_tokens: Tensor) -> Any:
    """The frozen model with a fresh adapter; a soft prompt starts from the embeddings of ``first_tokens``."""
    if name == "prompt":
        model = get_peft_model(
            model,
            PromptTuningConfig(
                task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PROMPT_TOKENS, base_model_name_or_path=BASE_NAME
            ),
        )
        with torch.no_grad():
            start = model.get_base_model().get_input_embeddings().weight[first_tokens]
            model.prompt_encoder["default"].embedding.weight.copy_(start)
        return model
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=8,
        lora_alpha=16,
        target_modules=LINEAR_LAYERS,
        use_dora=name == "dora",
        base_model_name_or_path=BASE_NAME,
    )
    return get_peft_model(model, config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example's models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=float, default=1.0, help="multiply every stage's steps by this")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="others are left as they are")
    parser.add_argument("--stdlib", type=Path, help="standard library to read (default: this Python's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")

    corpus = load_corpus(args.stdlib)
    (args.out / "heldout").mkdir(parents=True, exist_ok=True)
    for kind in ("source", "target"):
        text = getattr(corpus, f"{kind}_held_out")
        (args.out / "heldout" / f"{kind}.txt").write_text(text, encoding="utf-8")
    if "base" in args.stages:
        tokenizer = train_tokenizer(corpus.source_train, VOCABULARY, CONTEXT)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.out / "base")
    parts = ("source_train", "source_dev", "target_train", "docstrings", "target_dev")
    streams = {part: _stream(tokenizer, getattr(corpus, part)).to(args.device) for part in parts}
    print({part: len(stream) for part, stream in streams.items()}, flush=True)

    for name in [stage for stage in STAGES if stage in args.stages]:
        recipe = RECIPES[name]
        stage = Stage(max(1, round(recipe.steps * args.steps)), recipe.batch, recipe.peak, recipe.decay)
        print(f"{name}: {stage}", flush=True)
        torch.manual_seed(args.seed)
        train, dev = (("source_train",), "source_dev") if name == "base" else (TARGET_PARTS, "target_dev")
        if name == "base":
            model = _new_base(tokenizer)
        else:
            model = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32)
        if name in ("lora", "dora", "prompt"):
            model = _with_adapter(model, name, streams["target_train"][:PROMPT_TOKENS].cpu())
        model = model.to(args.device)
        log = fit(model, stage, [streams[t] for t in train], streams[dev], tokenizer.bos_token_id, args.seed)
        model = model.cpu()
        if name in ("base", "tuned"):
            save_model(model, tokenizer, args.out / name)
        else:
            save_adapter(model, args.out / name)
        record = {"stage": name, "seed": args.seed, **asdict(stage), "log": log}
        (args.out / name / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
