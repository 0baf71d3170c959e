# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: its converter writes ``lora_alpha`` alone, and the runtime divides it by each LoRA's own rank.

Versions are those of llama-cpp-python, which has both.
"""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, TraitRule, honoured, ignored, refused, remedy_of_kind
from surgery.consumers.facts import AdapterFacts, lacks_experts
from surgery.consumers.part import AdapterPart
from surgery.consumers.scales import alpha_over_own_rank

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
    scale=alpha_over_own_rank,
    dialect="vllm",
    exceptions=_exceptions,
    rules={
        "LoRA of an embedding": honoured,
        "LoRA of the head": honoured,
        "LoRA of one expert": honoured,
        "LoRA of stacked experts": refused("its names are of no tensor of the model", "dialect"),
        "LoRA taken for experts": honoured,
        "LoRA of a turned weight": refused(
            "the converter turns the product as it turns the weight, and PEFT's factors are not stored so"
        ),
        "LoRA of a convolution": refused("the converter expects matrices", "drop"),
        "LoRA on a changed base": ignored("it takes the factors for a LoRA of the base as it is", "lora"),
        "DoRA": refused(_UNEXPECTED, "lora"),
        "other kind": refused(_UNEXPECTED, "lora"),
        "bias of a LoRA": refused(_UNEXPECTED, "drop"),
        "trained bias": refused(_UNEXPECTED, "drop"),
        "saved norm": ignored("the converter keeps '_layernorm' and '.norm', the runtime passes over them", "drop"),
        "saved head": refused(_UNEXPECTED, "drop"),
        "saved module": refused(_UNEXPECTED, "saved"),
        "saved vocabulary": refused("'Embeddings is present in the adapter'", "saved"),
        "carried weight": honoured,
        "added rows": refused("'Embeddings is present in the adapter'", "drop"),
        "token rows": refused(_UNEXPECTED, "drop"),
        "virtual tokens": refused("it converts LoRA alone"),
        "pattern of targets": honoured,  # it goes by the tensors' names
        "no targets": honoured,
        "beyond the targets": honoured,
        "missing fields": honoured,
        "bias setting": honoured,
        "promised modules": honoured,
        "null patterns": honoured,
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "bare names": honoured,
        "wrapped names": refused("its names are of no tensor of the model", "rewrite"),
        "doubled prefix": honoured,
        "names of an adapter": refused(_UNEXPECTED, "rewrite"),
        "targeted parameters": honoured,
        "added tokens": honoured,  # not looked at
        "pickled weights": honoured,
        "other weight files": refused("it opens adapter_model.safetensors or adapter_model.bin", "rewrite"),
    },
)
