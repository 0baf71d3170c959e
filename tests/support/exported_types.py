# SPDX-License-Identifier: Apache-2.0
"""What docs/models.md tells: every model type that exports, and what the tests compare of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import transformers

from surgery.onnx.graph.build import takes_grouped
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model
from surgery_formats.models.families.registry import families
from tests.oracles import recipes

__all__ = ["LORA", "Exported", "exported", "page", "type_of"]

LORA = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3n",
        "phi3",
        "olmo",
        "olmo2",
        "granite",
        "smollm3",
    ),
    *(
        "stablelm",
        "gpt2",
        "gpt_neox",
        "opt",
        "phi",
        "starcoder2",
        "falcon_7b",
        "falcon_40b",
        "falcon_rw",
        "bloom",
        "gptj",
    ),
    *("gpt_neo", "cohere_normed", "cohere2", "glm", "glm4", "exaone4", "ministral", "ministral3", "olmo3", "cwm"),
    *(
        "vaultgemma",
        "hyperclovax",
        "nemotron",
        "jais2",
        "arcee",
        "apertus",
        "hunyuan",
        "ernie4_5",
        "helium",
        "seed_oss",
    ),
    *("gpt_bigcode", "mpt_clipped", "persimmon", "llava", "gemma3_images", "qwen2_5_vl", "smolvlm", "lfm2"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "gpt_oss", "deepseek_v2"),
    *("deepseek_v3", "glm4_moe", "ernie4_5_moe"),
)
"""Cases whose LoRA, of every linear layer, is compared merged and in slots."""

UNBUILT = {"gemma3n": "gemma3n"}
"""Types that transformers builds only with further packages, and the case of their language model, which the tests put into a
folder of that type (tests/onnx/test_gemma3n.py)."""

_TASKS = {
    "ForCausalLM": "text generation",
    "LMHeadModel": "text generation",
    "ForConditionalGeneration": "text from text or audio",
    "ForSequenceClassification": "sequence classification",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
    "ForMaskedLM": "masked tokens",
    "ForMultipleChoice": "multiple choice",
    "ForImageClassification": "image classification",
    "MTModel": "text from text or audio",
    "Model": "hidden states",
    "ModelWithProjection": "embeddings",
}

HEAD = """# Model types that export

Made by `python tools/models_page.py` from the recipes and from the cases that the tests compare; `pytest tests/test_docs.py` checks that
it is current. The type is `model_type` of config.json. A type that is not here, or a setting that its
recipe does not have, is refused by name.

Every case is a small random model, all of whose parameters matter, compared with transformers to 1e-4 in fp32: through onnxruntime for the
targets `cpu`, `portable` and (without what only the card has) `cuda`, and through the reference that `surgery verify` uses. Of decoders
that is the prompt, eight steps over a cache, the greedy tokens, and batches padded on the sides that the graph's contract allows.

*LoRA*: an adapter of every linear layer, merged and in slots, gives what PEFT gives with it attached. *Grouped*: `cpu` and `cuda` use
GroupQueryAttention with one buffer for the cache; types without it (biases on the scores) use the standard operator, whose cache grows.
"""


@dataclass(frozen=True)
class Exported:
    """One row.

    Attributes:
        type: ``model_type``.
        kind: As in `Model`.
        tasks: What its cases do.
        cases: How many cases are compared.
        lora: Whether LoRA is.
        grouped: Whether GroupQueryAttention takes its layers; None of other models than decoders.
        note: What its recipe says of it.
    """

    type: str
    kind: str
    tasks: tuple[str, ...]
    cases: int
    lora: bool
    grouped: bool | None
    note: str


def type_of(case: recipes.Case) -> str:
    """The ``model_type`` of a case."""
    return str(getattr(transformers, case.config).model_type)


def _model(case: recipes.Case) -> Model:
    config = getattr(transformers, case.config)(**case.fields)
    config.architectures = [case.cls]
    return model_of(json.loads(config.to_json_string(use_diff=True)), {"lm_head.weight", "embed_out.weight"})


def _task(case: recipes.Case, model: Model) -> str:
    endings = sorted((end for end in _TASKS if case.cls.endswith(end)), key=len)
    if endings[-1] == "ForConditionalGeneration" and model.encoder is None:  # the language model of one that sees
        return _TASKS["ForCausalLM"]
    return _TASKS[endings[-1]]


def exported() -> list[Exported]:
    """A row for every type with a recipe, in order."""
    rows = []
    for family in families():
        for name in family.names if family.recipe else ():
            own = {
                key: case for key, case in recipes.CASES.items() if type_of(case) == name or UNBUILT.get(name) == key
            }
            models = [_model(case) for case in own.values()]
            decoder = any(model.kind == "decoder" and model.encoder is None for model in models)
            rows.append(
                Exported(
                    type=name,
                    kind=", ".join(dict.fromkeys(_class(model) for model in models)),
                    tasks=tuple(dict.fromkeys(map(_task, own.values(), models))),
                    cases=len(own),
                    lora=any(key in LORA for key in own),
                    grouped=any(all(takes_grouped(one.attention) for one in model.layers) for model in models)
                    if decoder
                    else None,
                    note=_note(family.recipe),
                )
            )
    return sorted(rows, key=lambda row: row.type)


def _class(model: Model) -> str:
    return model.kind if model.encoder is None else "encoder and decoder"


def _note(recipe: Any) -> str:
    """The first line of a recipe's docstring, without its full stop."""
    text = getattr(recipe, "func", recipe).__doc__ or ""
    return text.strip().partition("\n")[0].rstrip(".").replace("|", "\\|")


def page() -> str:
    """The page's text."""
    rows = exported()
    lines = [HEAD, "| type | class | tasks compared | cases | LoRA | grouped | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        grouped = "" if row.grouped is None else "yes" if row.grouped else "no"
        cells = f"`{row.type}`", row.kind, ", ".join(row.tasks), row.cases, "yes" if row.lora else "", grouped, row.note
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join([*lines, "", f"{len(rows)} types.", ""])
