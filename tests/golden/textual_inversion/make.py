# SPDX-License-Identifier: Apache-2.0
"""Makes the golden files of textual inversions, and what diffusers reads of them.

Run it from this folder, in an environment with torch, diffusers and transformers (see ../README.md)::

    python make.py            # rewrites the files and expected.json
    python make.py --check    # makes everything again elsewhere and compares it with what is here

The layouts are those that A1111's ``modules/textual_inversion`` and diffusers' example save. Where diffusers reads a file by itself, the
expected rows are what its loader gives; SDXL's files have no such reader, their rows are taken as they are.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin, load_textual_inversion_state_dicts
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]


def files(root: Path) -> dict[str, tuple[str, str]]:
    """Writes them; ``(format, token)`` by name."""
    torch.manual_seed(1)
    rows, wide, big = torch.randn(2, 768), torch.randn(1024), torch.randn(2, 1280)
    old = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "old-cat", "step": 500}
    torch.save(old | {"sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5"}, root / "a1111.pt")
    save_file({"emb_params": rows.half()}, root / "fluffy.safetensors")
    torch.save({"<cat>": rows[0]}, root / "learned_embeds.bin")
    save_file({"<dog>": rows}, root / "learned_embeds.safetensors")
    save_file({"plain": wide}, root / "sd2.safetensors")
    save_file({"clip_l": rows, "clip_g": big}, root / "xl.safetensors")
    return {
        "a1111.pt": ("embedding", "old-cat"),
        "fluffy.safetensors": ("embedding", "fluffy"),
        "learned_embeds.bin": ("learned-embeds", "<cat>"),
        "learned_embeds.safetensors": ("learned-embeds", "<dog>"),
        "sd2.safetensors": ("learned-embeds", "plain"),
        "xl.safetensors": ("embedding", "xl"),
    }


def read(path: Path, width: int) -> torch.Tensor:
    """The rows that diffusers makes of a file."""
    state = load_textual_inversion_state_dicts([str(path)], local_files_only=True)
    table = torch.nn.Embedding(2, width)
    tokenizer = SimpleNamespace(get_vocab=dict, tokenize=lambda text: [text])
    loader = TextualInversionLoaderMixin()
    loader.tokenizer, loader.text_encoder = tokenizer, SimpleNamespace(get_input_embeddings=lambda: table)
    _, embeddings = loader._retrieve_tokens_and_embeddings(["<x>"], state, tokenizer)
    return embeddings[0]


def write(root: Path) -> None:
    cases = files(root)
    expected: Tensors = {}
    for name in cases:
        if name.startswith("xl"):
            found = load_file(root / name)
            expected |= {f"{name}/text_encoder": found["clip_l"], f"{name}/text_encoder_2": found["clip_g"]}
        else:
            width = 1024 if name.startswith("sd2") else 768
            expected[f"{name}/text_encoder"] = read(root / name, width).detach().contiguous()
    save_file(expected, root / "expected.safetensors")
    versions = {name: version(name) for name in ("torch", "diffusers")}
    stated = {name: {"format": format, "token": token} for name, (format, token) in cases.items()}
    (root / "expected.json").write_text(json.dumps({"versions": versions, "cases": stated}, indent=1) + "\n")


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep

    keep(HERE, write, check=sys.argv[1:] == ["--check"])


if __name__ == "__main__":
    main()
