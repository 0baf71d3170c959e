# SPDX-License-Identifier: Apache-2.0
"""Makes the golden files of inserted modules: adapters that AdapterHub's library saved, and what its models then answer.

Run it from this folder, in an environment with ``torch==2.13.0 adapters==1.3.0`` (see ../README.md)::

    python make.py            # rewrites the folders
    python make.py --check    # makes everything again elsewhere and compares it with what is here
    python make.py --refused  # prints what the library itself cannot run

Of every case there are the adapter as it was saved, and the answer for `IDS`: logits of a Llama, a GPT-2 or a classifier, else the last
hidden state. Stacks are several adapters, one after the other.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import adapters
import adapters.composition as ac
import torch
from adapters import (
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    LlamaAdapterModel,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
    SeqBnInvConfig,
)
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # on which the last bits of sums depend
IDS = [[5, 17, 3, 38, 12], [2, 9, 31, 7, 7]]
_TINY = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {**_TINY, "num_key_value_heads": 1, "tie_word_embeddings": False}
BASES: dict[str, tuple[type, Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**_TINY, **_STILL, num_labels=3)),
    "bert-bare": (BertModel, BertConfig(**_TINY, **_STILL)),
    "roberta": (RobertaModel, RobertaConfig(**_TINY, **_STILL, pad_token_id=1, type_vocab_size=1)),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**_GROUPED)),
    "mistral": (MistralForCausalLM, MistralConfig(**_GROUPED)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
}


def _bn(**fields: Any) -> BnConfig:
    return BnConfig(
        **{"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu", **fields}
    )


BOTH: dict[str, Any] = {  # on BERT, which has norms after its sums, and on Llama, which has them before its branches
    "seq": SeqBnConfig(reduction_factor=4),
    "double": DoubleSeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(reduction_factor=4),
    "parallel-learned": ParBnConfig(reduction_factor=4, scaling="learned", mh_adapter=True),
    "compacter": CompacterConfig(reduction_factor=4, phm_dim=2),
    "compacter-pp": CompacterPlusPlusConfig(reduction_factor=4, phm_dim=4),
    "phm-shared": CompacterConfig(
        reduction_factor=4, phm_dim=2, shared_W_phm=True, factorized_phm_rule=True, phm_rank=2
    ),
    "phm-own": CompacterConfig(reduction_factor=4, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False),
    "invertible": SeqBnInvConfig(reduction_factor=4),
    "norms": _bn(ln_before=True, ln_after=True),
    "norms-late": _bn(ln_after=True, adapter_residual_before_ln=True, non_linearity="tanh", scaling=0.5),
    "norms-parallel": _bn(ln_before=True, ln_after=True, is_parallel=True, non_linearity="leakyrelu"),
    "before-own": _bn(original_ln_before=True, residual_before_ln=False, non_linearity="gelu"),
    "before-alone": _bn(original_ln_before=True, original_ln_after=False, residual_before_ln=False),
    "nothing-kept": _bn(
        original_ln_before=False, original_ln_after=False, residual_before_ln=False, non_linearity="sigmoid"
    ),
    "gated": SeqBnConfig(reduction_factor=4, use_gating=True),
    "gated-parallel": ParBnConfig(reduction_factor=4, use_gating=True, ln_after=True),
    "plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "left-out": DoubleSeqBnConfig(reduction_factor={"0": 2, "default": 8}, leave_out=[1], scaling="learned"),
    "union": ConfigUnion(
        LoRAConfig(r=2, alpha=4),
        ParBnConfig(reduction_factor=4),
        SeqBnConfig(reduction_factor=8, mh_adapter=True, output_adapter=False),
    ),
}
CASES: dict[str, tuple[str, Any]] = {
    **{f"{base}-{name}": (base, config) for base in ("bert", "llama") for name, config in BOTH.items()},
    "bert-post-add": ("bert", _bn(original_ln_before=True, residual_before_ln="post_add")),
    "bert-with-head": ("bert", SeqBnConfig(reduction_factor=4)),
    "bert-bare-double": ("bert-bare", DoubleSeqBnConfig(reduction_factor=4)),
    "roberta-double": ("roberta", DoubleSeqBnConfig(reduction_factor=4)),
    "distilbert-double": ("distilbert", DoubleSeqBnConfig(reduction_factor=4, original_ln_before=True)),
    "llama-flexible": ("llama", SeqBnInvConfig(reduction_factor=4)),
    "mistral-seq": ("mistral", SeqBnConfig(reduction_factor=4)),
    "gpt2-double": ("gpt2", DoubleSeqBnConfig(reduction_factor=4)),
    "gpt2-invertible": ("gpt2", SeqBnInvConfig(reduction_factor=4)),
}
FLEXIBLE = {"llama-flexible"}  # of the library's own class, whose head turns an invertible adapter round
STACKS = {"bert-seq+norms": ["bert-seq", "bert-norms"], "llama-seq+parallel": ["llama-seq", "llama-parallel"]}
REFUSED: dict[str, tuple[str, Any]] = {
    "bert-glow": ("bert", SeqBnInvConfig(reduction_factor=4, inv_adapter="glow")),
    "llama-post-add": ("llama", _bn(original_ln_before=True, residual_before_ln="post_add")),
    "bert-post-add-late": ("bert", _bn(original_ln_before=False, residual_before_ln="post_add")),
}


def seeded(model: PreTrainedModel, seed: int, only: str = "") -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only and f".{only}." not in f".{name}.":
                continue
            around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            size = 1.0 if "phm_rule" in name or ".W_" in name else 0.4  # products of them are smaller
            parameter.copy_(around + size * torch.randn_like(parameter))
    return model


def loaded(base: str, root: Path, *, flexible: bool = False) -> PreTrainedModel:
    cls = LlamaAdapterModel if flexible else BASES[base][0]
    model = cls.from_pretrained(root / "base" / base).eval()
    if not flexible:
        adapters.init(model)
    return model.requires_grad_(False)


def answer(model: PreTrainedModel, active: Any) -> torch.Tensor:
    model.set_active_adapters(active)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return (found.logits if "logits" in found else found.last_hidden_state).contiguous()


def added(model: PreTrainedModel, name: str, config: Any) -> None:
    model.add_adapter(name, config=config)
    seeded(model, 7 + len(name), name)


def write(root: Path) -> None:
    for base, (cls, config) in BASES.items():
        seeded(cls(config), 1).save_pretrained(root / "base" / base)
        for file in (root / "base" / base).iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                file.unlink()
    answers = {}
    for case, (base, config) in CASES.items():
        model = loaded(base, root, flexible=case in FLEXIBLE)
        added(model, case, config)
        if case == "bert-with-head":
            seeded(model, 5, "classifier")
        safe = "norms" not in case  # a norm in front lies under two names, which safetensors refuses
        model.save_adapter(root / case, case, use_safetensors=safe, with_head=case == "bert-with-head")
        for file in (root / case).glob("*_config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"model_name": base}, sort_keys=True) + "\n")
        answers[case] = answer(model, case)
        plain = answer(model, None)
        assert (answers[case] - plain).abs().max() > 0.05, case
    for name, parts in STACKS.items():
        model = loaded(CASES[parts[0]][0], root)
        for part in parts:
            added(model, part, CASES[part][1])
        answers[name] = answer(model, ac.Stack(*parts))
    for base in BASES:
        answers[base] = answer(loaded(base, root), None)
    save_file(answers, root / "answers.safetensors")


def refused() -> None:
    for case, (base, config) in REFUSED.items():
        model = loaded(base, HERE)
        added(model, case, config)
        try:
            answer(model, case)
            print(case, "runs")
        except Exception as error:
            print(case, type(error).__name__, str(error)[:200])


def check() -> int:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        made = {p.relative_to(name) for p in Path(name).rglob("*") if p.is_file()}
        bad = [
            str(p)
            for p in sorted(made)
            if not (HERE / p).is_file() or (Path(name) / p).read_bytes() != (HERE / p).read_bytes()
        ]
        print("\n".join(f"differs: {p}" for p in bad) or f"{len(made)} files are the same")
        return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        sys.exit(check())
    if sys.argv[1:2] == ["--refused"]:
        sys.exit(refused())
    for folder in HERE.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    write(HERE)
