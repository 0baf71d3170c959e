# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: its converter writes ``lora_alpha`` alone, and the runtime divides it by each LoRA's own rank.

Of a PEFT folder the rules are those of the converter, of a GGUF those of the runtime.

Versions are those of llama-cpp-python, which has both.
"""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts, lacks_experts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, ignored, refused, remedy_of_kind
from surgery.consumers.scales import alpha_over_own_rank
from surgery.consumers.starts import BY_NAMES, lora_alone

__all__ = ["LLAMA_CPP"]

_UNEXPECTED = "the converter exits at any tensor that is no lora_A or lora_B: 'Unexpected name'"


def _exceptions(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """Configurations of other kinds, whatever their tensors are; tied vocabularies; layers that lack experts."""
    if part.trait == "missing fields" and part.name == "lora_alpha":
        return refused("its configuration has no 'lora_alpha'", "rewrite")
    if facts.adapter.kind != "LORA" and "lora_alpha" not in facts.config:
        return refused("its configuration has no 'lora_alpha'", remedy_of_kind(part))
    if part.trait in ("LoRA of an embedding", "LoRA of the head") and facts.main.tied:
        return refused("head and embedding are one tensor: the runtime dies at the first token", "drop")
    if part.trait == "LoRA of one expert" and lacks_experts(part, facts):
        return refused("it stacks all experts of a layer: 'Unprocessed experts'", "dialect")
    return None


LLAMA_CPP = RuledConsumer(
    name="llama.cpp",
    title="llama.cpp",
    version="0.3.36",
    oldest="0.3.36",
    sources=(
        SourceRead("llama-cpp-python", "0.3.36", "vendor/llama.cpp/convert_lora_to_gguf.py", "LoraModel"),
        SourceRead("ggml-org/llama.cpp", "0b03adaa", "convert_lora_to_gguf.py", "LoraModel"),
        SourceRead("ggml-org/llama.cpp", "0650ea8c", "src/llama-adapter.cpp", "llama_adapter_lora_init_impl"),
        SourceRead("ggml-org/llama.cpp", "0650ea8c", "src/llama-adapter.h", "llama_adapter_lora_weight::get_scale"),
    ),
    native=frozenset({"gguf"}),
    scale=alpha_over_own_rank,
    dialect="vllm",
    exceptions=_exceptions,
    rules={
        **BY_NAMES,
        **lora_alone(refused, _UNEXPECTED),
        "LoRA of stacked experts": refused("its names are of no tensor of the model", "dialect"),
        "LoRA of a turned weight": refused(
            "the converter turns the product as it turns the weight, and PEFT's factors are not stored so"
        ),
        "LoRA of a convolution": refused("the converter expects matrices", "drop"),
        "saved norm": ignored("the converter keeps '_layernorm' and '.norm', the runtime passes over them", "drop"),
        "saved vocabulary": refused("'Embeddings is present in the adapter'", "saved"),
        "added rows": refused("'Embeddings is present in the adapter'", "drop"),
        "virtual tokens": refused("it converts LoRA alone"),
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "wrapped names": refused("its names are of no tensor of the model", "rewrite"),
        "doubled prefix": honoured,
        "names of an adapter": refused(_UNEXPECTED, "rewrite"),
        "pickled weights": honoured,
        "other weight files": refused("it opens adapter_model.safetensors or adapter_model.bin", "rewrite"),
    },
)
