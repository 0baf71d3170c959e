# SPDX-License-Identifier: Apache-2.0
"""What each rounding of a 16-bit decoder costs, one at a time, on a random Llama of 16 layers: `python benchmarks/rounding.py`.

Weights are bfloat16 values; everything is computed in float32 and rounded where a 16-bit runtime rounds. No GPU, half a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

HIDDEN, INNER, LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD, TOKENS, MEASURED = 512, 2048, 16, 16384, 8, 2, 64, 96, 32
PLACES = {
    "stream": "residual stream after each sum", "norm": "output of a norm", "qkv": "queries, keys, values", "rotated": "rotated ones",
    "softmax": "attention's weights", "attended": "output of attention", "o": "its projection", "up": "gate and up", "silu": "SiLU",
    "product": "gate times up", "down": "down", "logits": "logits", "rotary": "rotary tables",
}  # fmt: skip
INSIDE = {"softmax", "silu"}  # never leave a fused kernel

Round = Callable[[torch.Tensor], torch.Tensor]
Layer = Mapping[str, torch.Tensor]


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def fp16(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def model() -> tuple[torch.Tensor, list[Layer]]:
    """Matrices as large as those of the benchmark: outputs of a branch have the size of 1 at any width."""
    made = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float = 0.9) -> torch.Tensor:
        return bf16(torch.randn(rows, columns, generator=made) * scale / math.sqrt(columns))

    def gain() -> torch.Tensor:
        return bf16(1 + 0.1 * torch.randn(HIDDEN, generator=made))

    layers = [
        {
            "q": matrix(HEADS * HEAD, HIDDEN), "k": matrix(KV_HEADS * HEAD, HIDDEN), "v": matrix(KV_HEADS * HEAD, HIDDEN),
            "o": matrix(HIDDEN, HEADS * HEAD), "gate": matrix(INNER, HIDDEN), "up": matrix(INNER, HIDDEN),
            "down": matrix(HIDDEN, INNER, 1.8), "before": gain(), "after": gain(),
        }
        for _ in range(LAYERS)
    ]  # fmt: skip
    return matrix(VOCABULARY, HIDDEN), layers


def logits(table: torch.Tensor, layers: list[Layer], ids: torch.Tensor, rounds: Mapping[str, Round]) -> torch.Tensor:
    """Of the last tokens, rounded at the places named in `rounds`."""

    def at(place: str, x: torch.Tensor) -> torch.Tensor:
        return rounds[place](x) if place in rounds else x

    angles = torch.arange(TOKENS)[:, None] * 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = at("rotary", angles.cos()), at("rotary", angles.sin())
    hidden = torch.full((TOKENS, TOKENS), -1e30).triu(1)

    def norm(x: torch.Tensor, gain: torch.Tensor | float) -> torch.Tensor:
        return at("norm", x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * gain)

    def heads(x: torch.Tensor, rotate: bool = True) -> torch.Tensor:
        x = at("qkv", x).view(TOKENS, -1, HEAD).transpose(0, 1)
        a, b = x.chunk(2, -1)
        x = at("rotated", torch.cat([a * cos - b * sin, a * sin + b * cos], -1)) if rotate else x
        return x.repeat_interleave(HEADS // x.shape[0], 0)

    x = table[ids]
    for layer in layers:
        y = norm(x, layer["before"])
        q, k, v = heads(y @ layer["q"].T), heads(y @ layer["k"].T), heads(y @ layer["v"].T, False)
        weights = at("softmax", torch.softmax(q @ k.transpose(1, 2) / math.sqrt(HEAD) + hidden, -1))
        attended = at("attended", weights @ v).transpose(0, 1).reshape(TOKENS, -1)
        x = at("stream", x + at("o", attended @ layer["o"].T))
        y = norm(x, layer["after"])
        gate, up = at("up", y @ layer["gate"].T), at("up", y @ layer["up"].T)
        inner = at("product", at("silu", torch.nn.functional.silu(gate)) * up)
        x = at("stream", x + at("down", inner @ layer["down"].T))
    return at("logits", norm(x[-MEASURED:], 1.0) @ table.T)


def main() -> None:
    table, layers = model()
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    exact = logits(table, layers, ids, {})

    def show(name: str, rounds: Mapping[str, Round]) -> None:
        error = logits(table, layers, ids, rounds) - exact
        worst = (error.abs().amax(-1) / exact.abs().amax(-1)).max()
        spread = (error.norm(dim=-1) / exact.norm(dim=-1)).max()
        print(f"| {name} | {worst:.4f} | {spread:.4f} |")

    print("| rounded | largest error / largest logit | norm of error / norm |\n|---|---|---|")
    show("everything to bf16, as torch does", dict.fromkeys(PLACES, bf16))
    show("everything but what stays inside kernels", dict.fromkeys(PLACES.keys() - INSIDE, bf16))
    show("everything but the stream", dict.fromkeys(PLACES.keys() - INSIDE - {"stream"}, bf16))
    show("everything but stream and logits", dict.fromkeys(PLACES.keys() - INSIDE - {"stream", "logits"}, bf16))
    show("inputs of matrices alone", dict.fromkeys(("norm", "attended", "product"), bf16))
    show("outputs of matrices alone", dict.fromkeys(("qkv", "o", "up", "down", "logits"), bf16))
    for place, name in PLACES.items():
        show(f"{name} alone", {place: bf16})
    show("everything to fp16", dict.fromkeys(PLACES, fp16))
    show("everything to fp16 but the stream", dict.fromkeys(PLACES.keys() - {"stream"}, fp16))


if __name__ == "__main__":
    main()
