# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with weights, as files, as headers, and as values and shapes: more of `tests.oracles.bad_inputs`."""

from __future__ import annotations

import numpy as np

from tests.oracles import hostile
from tests.oracles.bad_inputs import ADAPTER, FILES, MODEL, add, at, changed_bytes, poke, tensors

__all__: list[str] = []


# --- weights, in whatever they are --------------------------------------------------------------------------------------------
_WEIGHTS = (
    ("base", "model.safetensors", "model"),
    ("tuned", "model.safetensors", "model"),
    ("lora", "adapter_model.safetensors", "adapter_model"),
    ("prompt", "adapter_model.safetensors", "adapter_model"),
    ("delta", "adapter_model.safetensors", ""),
)
for _of, _file, _stem in _WEIGHTS:
    for _name, _change in FILES.items():
        add(f"{_of}-weights-{_name}", _of, at(_file, _change), (3, 4), _stem, some=0 if _name == "cut-off" else 4)
    for _name, _lie in hostile.LIES.items() if _of != "prompt" else ():  # which has one tensor only
        add(f"{_of}-header-{_name}", _of, changed_bytes(_file, _lie), 3, _stem, some=2)


# --- values and shapes --------------------------------------------------------------------------------------------------------
Q0, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
_NOT_EMPTY = "merge|convert|combine|resize|export|unmerge"
_COMPUTE_LORA = r"merge (?!.*dry)|insert .*--base|convert|combine|resize|export-onnx|check .*--fix|diff"

for _value, _word in ((float("nan"), "nan"), (float("inf"), "inf")):
    add(f"lora-A-{_word}", "lora", tensors(ADAPTER, poke(A0, _value)), (3, 4), "q_proj", only=_COMPUTE_LORA)
    add(f"lora-B-{_word}", "lora", tensors(ADAPTER, poke(B1, _value)), (3, 4), "v_proj", only=_COMPUTE_LORA)
    add(
        f"base-{_word}",
        "base",
        tensors(MODEL, poke(Q0, _value)),
        (3, 4, 5),
        only=r"merge \{base(?!.*dry)|extract|insert .*pissa",
    )
    add(f"tuned-{_word}", "tuned", tensors(MODEL, poke(DOWN, _value)), (3, 4), "down_proj", only="extract")
    add(
        f"prompt-{_word}",
        "prompt",
        tensors(ADAPTER, poke("prompt_embeddings", _value)),
        (3, 4),
        "prompt",
        only="prompt|export",
    )
_FITS = r"merge|insert .*(unmerged|--base)|export-onnx|check|convert .*--(for|graph)"
add(
    "lora-wide",
    "lora",
    tensors(ADAPTER, lambda t: t.update({A0: np.ones((2, 17), np.float32)})),
    (3, 4),
    "q_proj",
    only=_FITS,
)
add(
    "lora-tall",
    "lora",
    tensors(ADAPTER, lambda t: t.update({B1: np.ones((9, 2), np.float32)})),
    (3, 4),
    "v_proj",
    only=_FITS,
)
add("lora-rank", "lora", tensors(ADAPTER, lambda t: t.update({A0: np.ones((3, 16), np.float32)})), (3, 4), "q_proj")
add("lora-half", "lora", tensors(ADAPTER, lambda t: t.pop(B1)), (3, 4), "layers.1.self_attn.v_proj")
add("lora-vector", "lora", tensors(ADAPTER, lambda t: t.update({A0: np.ones(32, np.float32)})), (3, 4), "q_proj")
add(
    "lora-int8",
    "lora",
    tensors(ADAPTER, lambda t: t.update({A0: np.ones((2, 16), np.int8)})),
    (3, 4),
    "lora_A",
    only=_COMPUTE_LORA,
)
add("lora-rank-0", "lora", tensors(ADAPTER, lambda t: t.update({A0: np.ones((0, 16), np.float32)})), (3, 4), "q_proj")
add(
    "lora-stray",
    "lora",
    tensors(ADAPTER, lambda t: t.update({"base_model.model.stray.thing": np.ones(3, np.float32)})),
    (3, 4),
    "stray",
)
add("lora-none", "lora", tensors(ADAPTER, lambda t: t.clear()), (3, 4), "lora", only=_NOT_EMPTY)
add(
    "lora-elsewhere",
    "lora",
    tensors(
        ADAPTER,
        lambda t: [t.update({k.replace("layers.1", "layers.7"): t.pop(k)}) for k in list(t) if "layers.1" in k],
    ),
    (3, 4),
    "layers.7",
    only=_FITS,
)
add(
    "prompt-wide",
    "prompt",
    tensors(ADAPTER, lambda t: t.update(prompt_embeddings=np.ones((3, 17), np.float32))),
    (3, 4),
    "prompt",
    only="prompt (show|nearest|bake|convert|transfer)|export",
)
add(
    "prompt-vector",
    "prompt",
    tensors(ADAPTER, lambda t: t.update(prompt_embeddings=np.ones(48, np.float32))),
    (3, 4),
    "prompt",
)
add("prompt-gone", "prompt", tensors(ADAPTER, lambda t: t.clear()), (3, 4), "prompt")
add(
    "base-misses-a-weight",
    "base",
    tensors(MODEL, lambda t: t.pop(DOWN)),
    (3, 4),
    "down_proj",
    only="export-onnx|extract|unmerge|diff .*fail",
)
add("base-misses-q", "base", tensors(MODEL, lambda t: t.pop(Q0)), (3, 4), "q_proj", only=_FITS)
add(
    "base-of-other-width",
    "base",
    tensors(MODEL, lambda t: t.update({Q0: np.ones((16, 17), np.float32)})),
    (3, 4),
    "q_proj",
    only=_FITS + "|extract",
)
add(
    "tuned-of-other-width",
    "tuned",
    tensors(MODEL, lambda t: t.update({DOWN: np.ones((16, 9), np.float32)})),
    (3, 4),
    "down_proj",
    only="extract",
)
add(
    "base-int8",
    "base",
    tensors(MODEL, lambda t: t.update({Q0: np.ones((16, 16), np.int8)})),
    (3, 4),
    "q_proj",
    only="merge|export",
)
