# SPDX-License-Identifier: Apache-2.0
"""Every key of a configuration, changed one at a time: the same numbers as transformers, or a refusal that names the key."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.activations import ACT2FN

from surgery.reference import encode, forward, open_reference
from surgery_formats.errors import SurgeryError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes

__all__ = ["LIMIT", "Change", "changes", "compared"]

LIMIT = 1e-4
Change = tuple[tuple[str, ...], Any]
"""The path of a key, and its new value."""

_SKIPPED = (
    *("dropout", "pdrop", "initializer", "init_", "_std", "_init", "use_cache", "output_", "return_dict", "dtype"),
    *(
        "architectures",
        "label2id",
        "id2label",
        "transformers_version",
        "model_type",
        "_name_or_path",
        "is_encoder_decoder",
    ),
    *(
        "bos_token",
        "sep_token",
        "decoder_start",
        "forced_",
        "suppress",
        "_attn_impl",
        "tokenizer_class",
        "task_specific",
    ),
    *("router_aux", "aux_loss", "router_jitter", "output_router", "z_loss", "chunk_size_feed", "vocab_size"),
    *("jitter_noise", "layerdrop", "layer_drop", "_prob", "apply_spec", "mask_time", "mask_feature", "pretraining_tp"),
    *(
        "num_beams",
        "max_length",
        "early_stopping",
        "begin_",
        "sparse_pred",
        "repad_logits",
        "image_token",
        "video_token",
    ),
    *("vision_start", "vision_end", "drop_path", "initial", "reference_compile", "init_std", "audio"),
)
_WORDS: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("relative_key", "relative_key_query", "rotary", "absolute", "alibi"),
    "feed_forward_proj": ("relu", "gated-gelu", "gated-silu", "gelu", "gated-relu", "silu", "gelu_new"),
    "classifier_pooling": ("cls", "mean", "bos", "late", "max"),
    "norm_rel_ebd": ("none", "layer_norm"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
    "problem_type": ("regression", "single_label_classification", "multi_label_classification"),
    "summary_type": ("cls_index", "first", "mean"),
    "pos_att_type": ([], ["c2p"], ["p2c"], ["c2p", "p2c"], "c2p", ["p2p"]),
    "pad_token_id": (0, 1, 5, None),
    "eos_token_id": (5, None),
    "layernorm_type": ("rms_norm", "layer_norm"),
    "rope_scaling": (
        {"rope_type": "linear", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ),
    "attention_types": ([[["global"], 3]], [[["local"], 3]], [[["local", "global", "local"], 1]]),
    "no_rope_layers": ([0, 1, 0], [1, 1, 1]),
    "mlp_only_layers": ([0], [1]),
    "mlp_layer_types": (["dense"] * 3, ["sparse"] * 3),
    "conv_act": ("tanh", "relu", "gelu"),
}
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
    {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.5},
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7},
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "attention_factor": 0.7},
    {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "proportional", "rope_theta": 500.0},
    {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
)


def _variants(key: str, value: Any, config: Mapping[str, Any]) -> Iterator[Any]:
    """Other values of `key`."""
    if key in _WORDS:
        yield from _WORDS[key]
    elif key == "rope_parameters" and isinstance(value, dict):
        for rope in _ROPES:
            if any(isinstance(inner, dict) for inner in value.values()):
                yield {**value, "full_attention": rope}
                yield {**value, "sliding_attention": rope}
                yield rope
            else:
                yield {
                    **{k: v for k, v in value.items() if "section" in k or "interleaved" in k or "llama_4" in k},
                    **rope,
                }
        if not any(isinstance(inner, dict) for inner in value.values()):
            yield {"full_attention": _ROPES[0], "sliding_attention": _ROPES[2]}
            dims = (
                config.get("head_dim") or config.get("hidden_size", 32) // config.get("num_attention_heads", 4)
            ) // 2
            for n in (dims, dims // 2):
                yield {
                    "rope_type": "longrope",
                    "rope_theta": 500.0,
                    "short_factor": [1.1] * n,
                    "long_factor": [2.0] * n,
                    "original_max_position_embeddings": 8,
                }
                yield {
                    "rope_type": "longrope",
                    "rope_theta": 500.0,
                    "short_factor": [1.1] * n,
                    "long_factor": [2.0] * n,
                    "factor": 3.0,
                }
    elif ("act" in key and isinstance(value, str) and value in ACT2FN) or key in ("hidden_act", "hidden_activation"):
        yield from ACT2FN
    elif key in ("layer_types", "attention_layers"):
        n = len(value) if value else 3
        for kind in ("full_attention", "sliding_attention", "conv", "chunked_attention", "global", "local"):
            yield [kind] * n
        yield (["sliding_attention", "full_attention"] * n)[:n]
        yield (["full_attention", "sliding_attention"] * n)[:n]
    elif isinstance(value, bool):
        yield not value
        yield None
    elif "eps" in key:
        yield from (0.3, 1e-12)
    elif isinstance(value, int):
        fewest = 16 if key == "max_seq_len" else -1  # MPT's bias reaches no further, and fails silently beyond
        yield from (
            each for each in dict.fromkeys((0, 1, 2, 3, value * 2, value // 2, value + 1, -1)) if each >= fewest
        )
        yield None
    elif isinstance(value, float):
        yield from (value * 1.7 + 0.3, 0.0, 1.0, None)
    elif value is None:
        yield from (True, 1, 2, 5, 0.5, "gelu", "mean")
    elif isinstance(value, list) and value and all(type(item) in (int, float) for item in value):
        yield [item * 2 for item in value]
        yield value[::-1]
        yield []


def changes(name: str) -> Iterator[Change]:
    """The changes of each key of a case."""
    case = recipes.CASES[name]
    config = getattr(transformers, case.config)(**case.fields).to_dict()

    def walk(part: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Change]:
        for key, value in part.items():
            if any(word in key for word in _SKIPPED) or (path and path[0] == "vision_config" and "text" in name):
                continue
            if isinstance(value, dict) and (key.endswith("_config")):
                if key == "vision_config" and name in recipes.DECODERS:
                    continue
                yield from walk(value, (*path, key))
                continue
            seen: list[Any] = []
            for other in _variants(key, value, part):
                if other not in seen and not (other == value and type(other) is type(value)):
                    seen.append(other)
                    yield (*path, key), other

    yield from walk(config, ())


def _fields(name: str, change: Change | None) -> dict[str, Any]:
    fields = copy.deepcopy(dict(recipes.CASES[name].fields))
    if change is None:
        return fields
    (*path, key), value = change
    part = fields
    for step in path:
        part = part.setdefault(step, {})
    part[key] = copy.deepcopy(value)
    return fields


def _inputs(model: Any, name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    config = model.config
    if name in recipes.IMAGES:
        vision = getattr(config, "vision_config", config)
        sides = vision.image_size if isinstance(vision.image_size, list) else [vision.image_size] * 2
        return {"pixel_values": torch.randn(2, vision.num_channels, *sides, generator=generator)}
    ids = torch.randint(8, recipes.VOCAB, (2, 13), generator=generator)
    if name.startswith("clip_text"):
        ids[:, -2] = config.eos_token_id if config.eos_token_id != 2 else recipes.VOCAB - 1
    if name == "whisper":
        return {
            "input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator),
            "decoder_input_ids": ids,
        }
    if name in recipes.PAIRS:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    if recipes.CASES[name].cls.endswith("ForMultipleChoice"):
        # transformers 5.23's ModernBERT for choices, with its pooling of the mean, fails without a mask.
        return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    return {"input_ids": ids}


@torch.no_grad()
def _theirs(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = model(**inputs)
    names = (
        "logits",
        "start_logits",
        "end_logits",
        "last_hidden_state",
        "pooler_output",
        "image_embeds",
        "text_embeds",
    )
    return {key: out[key] for key in names if out.get(key) is not None}


@torch.no_grad()
def _ours(folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    reference = open_reference(open_checkpoint(folder).main)
    if "decoder_input_ids" in inputs:
        source = inputs.get("input_ids", inputs.get("input_features"))
        out = forward(reference, inputs["decoder_input_ids"], encoded=encode(reference, source))
    else:
        first = next(iter(inputs.values()))
        out = forward(reference, first.reshape(-1, first.shape[-1]) if first.ndim == 3 else first)
    return {"logits": out.logits, **out.outputs}


def compared(name: str, change: Change | None) -> tuple[str, str]:
    """What came of a change: ``unbuilt`` by transformers, ``refused`` by us, ``broken``, ``equal`` or ``different``."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = recipes.made(name, **_fields(name, change)).eval()
            model.save_pretrained(folder)
            if name in recipes.PAIRS:  # some do not save their sinusoids
                model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
            model.set_attn_implementation("sdpa" if name == "falcon_rw" else "eager")
            inputs = _inputs(model, name)
            theirs = _theirs(model, inputs)
        except Exception as error:
            return "unbuilt", f"{type(error).__name__}: {error}"[:200]
        if not all(bool(value.isfinite().all()) for value in theirs.values()):
            return "unbuilt", "not finite"
        try:
            ours = _ours(Path(folder), inputs)
        except SurgeryError as error:
            return "refused", str(error).replace("\n", " ")[:300]
        except Exception as error:
            return "broken", f"{type(error).__name__}: {error}"[:300]
    gaps = {}
    for key, value in theirs.items():
        mine = ours.get(key)
        if mine is None:
            continue
        mine = mine.reshape(value.shape) if mine.numel() == value.numel() else mine
        if mine.shape != value.shape:
            return "different", f"{key}: shapes {tuple(mine.shape)} {tuple(value.shape)}"
        gaps[key] = float((mine - value).abs().max() / max(1.0, float(value.abs().max())))
    if not gaps:
        return "broken", f"nothing to compare: {sorted(theirs)} {sorted(ours)}"
    worst = max(gaps, key=lambda key: gaps[key])
    return ("equal" if gaps[worst] <= LIMIT else "different"), f"{worst} {gaps[worst]:.2g}"
