# SPDX-License-Identifier: Apache-2.0
"""Write the example's models in the layouts of the Hugging Face libraries, the same bytes every time.

``save_pretrained`` leaves sets in arbitrary order, machine paths, an empty model card and private file modes behind;
what is shipped should have none of these.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["BASE_NAME", "save_adapter", "save_model", "train_tokenizer"]

BASE_NAME = "examples/base"
_LOADING = ("is_local", "local_files_only")  # how a tokenizer was found, not what it is
_BOS, _EOS, _PAD = "<|begin|>", "<|end|>", "<|pad|>"


def train_tokenizer(texts: tuple[str, ...], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (every text is representable), trained on the source texts alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A",
        pair=f"{_BOS} $A {_BOS} $B",
        special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _tidy_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if key not in _LOADING}
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _tidy_folder(folder: Path) -> None:
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
    for weights in folder.glob("*.safetensors"):
        save_file({k: v.contiguous() for k, v in sorted(load_file(weights).items())}, weights, {"format": "pt"})
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors creates 0600


def save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A model folder in bfloat16; ``model`` itself is left in its own dtype."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _tidy_json(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    # The class's name before and after version 5 of transformers.
    _tidy_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _tidy_folder(folder)


def save_adapter(model: Any, folder: Path) -> None:
    """A PEFT folder."""
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    changes: dict[str, Any] = {"base_model_name_or_path": BASE_NAME}
    if config.get("target_modules"):
        changes["target_modules"] = sorted(config["target_modules"])  # a set in memory
    _tidy_json(folder / "adapter_config.json", **changes)
    _tidy_folder(folder)
