# SPDX-License-Identifier: Apache-2.0
"""diffusers: ``load_textual_inversion``, and what the text encoder makes of a prompt with its token.

``--make FOLDER`` writes a pipeline that is a tokenizer and a text encoder, ``embedding.safetensors`` for it as A1111 has it, and
``dense``, the pipeline to which transformers added the tokens and their rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from denoiser_families import draw
from denoisers import pipeline_of, seeded
from diffusers import StableDiffusionPipeline
from loading import Found, run
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = [
    "a</w>",
    "cat</w>",
    "of</w>",
    "<",
    "e",
    "m",
    "b",
    "d",
    "i",
    "n",
    "g",
    ">",
    "_",
    "1",
    ">",
    "</w>",
    "<|startoftext|>",
    "<|endoftext|>",
]
TOKEN, ROWS, WIDTH = "embedding", 2, 768  # the file's name is the token, and its width tells the encoder


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys(WORDS))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer: Any = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    encoder = seeded(CLIPTextModel(config), 1)
    pipeline_of("sd15", {"tokenizer": tokenizer, "text_encoder": encoder}).save_pretrained(folder / "pipeline")
    rows = draw(ROWS, WIDTH)
    save_file({"emb_params": rows}, folder / "embedding.safetensors")
    tokenizer.add_tokens([TOKEN, *(f"{TOKEN}_{at}" for at in range(1, ROWS))])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.get_input_embeddings().weight.data[-ROWS:] = rows
    pipeline_of("sd15", {"tokenizer": tokenizer, "text_encoder": encoder}).save_pretrained(folder / "dense")


def opened(base: Path) -> Callable[[Path | None], Found]:
    index = json.loads((base / "model_index.json").read_text())
    absent = {key: None for key, value in index.items() if isinstance(value, list) and value[0] is None}

    def load(file: Path | None) -> Found:
        pipe: Any = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, **absent)
        if file is not None:
            named = (
                {"token": TOKEN} if file.stem == TOKEN else {}
            )  # A1111's do not say it: diffusers would take "emb_params"
            pipe.load_textual_inversion(str(file), **named)
        prompt = pipe.maybe_convert_prompt(f"a {TOKEN} of a cat", pipe.tokenizer)
        ids = pipe.tokenizer(
            prompt, padding="max_length", max_length=14, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            return {"hidden": pipe.text_encoder.eval()(ids).last_hidden_state[0]}

    return load


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]))
        sys.exit()
    run(opened, "diffusers", "transformers")
