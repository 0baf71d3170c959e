# SPDX-License-Identifier: Apache-2.0
"""The models of docs/deploying.md, and what each must answer by PEFT and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

__all__ = ["IDS", "NEW", "PAD", "PAIRS", "PROMPT", "ROWS", "TEXTS", "TEXT_NEW", "TRAINED", "make_models"]

IDS = [5, 17, 33, 9, 101, 44]
ROWS = [IDS, [8, 61, 12]]
NEW, PAD, END = 8, 0, 255
PROMPT, TEXT_NEW = "def add(a, b):", 24  # of TRAINED, whose text differs without the token of the beginning
TRAINED = Path(__file__).resolve().parents[2] / "examples" / "base"
TEXTS = ["w9 w17 w44", "w8"]  # of different length, for a batch
PAIRS = [("w9 w10", "w17"), ("w8", "w61 w12 w77")]


def spread(model: Any) -> Any:
    """Random weights of which none is 0 or 1."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, 0.5 if parameter.dim() == 1 else 0.0, 0.15)
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words, with a beginning and an end as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(5, 255)), "[END]"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # whose class transformers 4 does not know
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def text_of_trained() -> str:
    """What the trained example goes on with, by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TRAINED)
    model = transformers.AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    given = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**given, max_new_tokens=TEXT_NEW)
    return str(tokenizer.decode(out[0, given["input_ids"].shape[1] :]))


def make_models(work: Path) -> dict[str, Any]:
    """Write the models; returns what each must answer, by kind."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "pad_token_id": PAD}
    llama = transformers.LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=END)
    spread(transformers.LlamaForCausalLM(llama)).save_pretrained(work / "decoder")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(work / "decoder"), config)
    for name, parameter in tuned.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.data, 0.0, 0.1)
    tuned.save_pretrained(work / "lora")
    write_tokenizer(work / "decoder")
    tuned.eval()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": END}
    rows = []
    for row in ROWS:
        ids = torch.tensor([row])
        rows.append(
            tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(row) :].tolist()
        )
    bert = transformers.BertConfig(**sizes)
    wanted: dict[str, Any] = {"generate": rows[0], "batch": rows, "text": text_of_trained()}
    t5 = transformers.T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=PAD, eos_token_id=END,
        decoder_start_token_id=PAD,
    )  # fmt: skip
    pair = spread(transformers.T5ForConditionalGeneration(t5))
    pair.save_pretrained(work / "seq2seq")
    ids = torch.tensor([IDS])
    wanted["seq2seq"] = pair.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist()
    for kind, model in (
        ("embed", transformers.BertModel(bert)),
        ("classify", transformers.BertForSequenceClassification(bert)),
    ):
        spread(model).save_pretrained(work / kind)
        write_tokenizer(work / kind)
        text = transformers.AutoTokenizer.from_pretrained(work / kind)
        wanted[kind], wanted[f"{kind} text"] = [], []
        with torch.no_grad():
            for row in (IDS, *ROWS):  # alone, then the rows of a batch
                found = model(input_ids=torch.tensor([row]))
                wanted[kind] += (found.last_hidden_state if kind == "embed" else found.logits).ravel().tolist()
            for one in TEXTS if kind == "embed" else PAIRS:
                given = dict(text(*([one] if kind == "embed" else one), return_tensors="pt"))
                second = given["input_ids"][0].tolist().index(2) + 1  # where the pair's other text begins
                types = (torch.arange(given["input_ids"].shape[1]) >= second).long()[None]
                found = model(**given | {"token_type_ids": types if kind == "classify" else types * 0})
                from_text = found.last_hidden_state.mean(1) if kind == "embed" else found.logits
                wanted[f"{kind} text"] += from_text.ravel().tolist()
    return wanted
