# SPDX-License-Identifier: Apache-2.0
"""LoRA files for `peers_kohya.py`: kohya's, of LyCORIS' kinds and with faults, and what each changes by definition, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

__all__ = ["CASES", "FAULTY", "MAKERS", "Keys", "Tensors", "change_of", "factors", "named"]

Tensors = dict[str, torch.Tensor]
Where = str | Sequence[tuple[str, int, int]]
Keys = Mapping[str, Where]
"""By a LoRA's name of a parameter: the checkpoint's, or the parts of it: a tensor's name, the first row, the last."""
_LEAF = re.compile(r"\.(?=(?:lora_|hada_|lokr_|alpha$|dora_scale$|diff(?:_b)?$))")
_NAMES = {"lora_A": "lora_down", "lora_B": "lora_up", "lora_magnitude_vector": "dora_scale"}


def factors(lora: Tensors) -> Iterable[tuple[str, Tensors]]:
    """By module, its tensors in float64 under sd-scripts' names."""
    modules: dict[str, Tensors] = {}
    for key, value in lora.items():
        module, leaf = _LEAF.split(key, maxsplit=1)
        name = leaf.removesuffix(".weight")
        modules.setdefault(module, {})[_NAMES.get(name, name)] = value.double()
    return modules.items()


def _delta(held: Tensors) -> torch.Tensor:
    """What LyCORIS' definitions say a module's tensors add to its weight, before a norm is set."""
    rank = next((len(held[name]) for name in ("lora_down", "hada_w1_b", "lokr_w2_b") if name in held), 1)
    scale = float(held.get("alpha", torch.tensor(rank))) / rank
    if "hada_w1_a" in held:
        return scale * (held["hada_w1_a"] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"])
    if "lokr_w1" in held:
        return scale * torch.kron(held["lokr_w1"], held["lokr_w2_a"] @ held["lokr_w2_b"])
    up, down = held["lora_up"], held["lora_down"]
    if "lora_mid" in held:
        return scale * torch.einsum("mnkl,om,ni->oikl", held["lora_mid"], up[..., 0, 0], down[..., 0, 0])
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _rows(where: Where) -> list[tuple[str, slice]]:
    """Tensors, and which rows of them a parameter lies in, one after the other."""
    if isinstance(where, str):
        return [(where, slice(None))]
    return [(name, slice(start, stop)) for name, start, stop in where]


def _weight(base: Mapping[str, torch.Tensor], where: Where) -> torch.Tensor:
    return torch.cat([base[name][rows].double() for name, rows in _rows(where)])


def change_of(lora: Tensors, base: Mapping[str, torch.Tensor], keys: Keys) -> Tensors:
    """By the checkpoint's names, what a file changes, in float64. `base` is read for the norms of DoRA."""
    changes: Tensors = {}
    for module, held in factors(lora):
        if "diff" in held or "diff_b" in held:
            for leaf, parameter in (("diff", "weight"), ("diff_b", "bias")):
                if leaf in held:
                    changes[keys[f"{module}.{parameter}"]] = held[leaf]
            continue
        where = keys[f"{module}.weight"]
        weight = _weight(base, where)
        delta = _delta(held).reshape(weight.shape)
        if "dora_scale" in held:
            moved = (weight + delta).flatten(1)
            scale = held["dora_scale"].reshape(-1, 1) / moved.norm(dim=1, keepdim=True)
            delta = (moved * scale).reshape(weight.shape) - weight
        for key, rows in _rows(where):
            whole = changes.setdefault(key, torch.zeros(base[key].shape, dtype=torch.float64))
            whole[rows] += delta[: len(whole[rows])]
            delta = delta[len(whole[rows]) :]
    return changes


def _without_alpha(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    return {key: value for key, value in lora.items() if not key.endswith(".alpha")}


def _tucker(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    made: Tensors = {}
    for module, held in factors(lora):
        new = dict(held)
        if held["lora_down"].ndim == 4 and held["lora_down"].shape[-1] == 3:
            rank = len(held["lora_down"])
            new |= {"lora_mid": torch.randn(rank, rank, 3, 3) * 0.3, "lora_down": held["lora_down"][..., :1, :1]}
        made |= _named(module, new)
    return made


def _dora(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    made: Tensors = {}
    for module, held in factors(lora):
        weight = _weight(base, keys[f"{module}.weight"])
        sizes = weight.flatten(1).norm(dim=1) * (1 + 0.1 * torch.randn(len(weight)))
        made |= _named(module, held | {"dora_scale": sizes.reshape(-1, *[1] * (weight.ndim - 1))})
    return made


def _linear(lora: Tensors) -> Iterable[tuple[str, Tensors]]:
    return ((module, held) for module, held in factors(lora) if held["lora_down"].ndim == 2)


def _loha(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    made: Tensors = {}
    for module, held in _linear(lora):
        up, down = held["lora_up"], held["lora_down"]
        halves = {
            "hada_w1_a": up,
            "hada_w1_b": down,
            "hada_w2_a": torch.randn_like(up),
            "hada_w2_b": torch.randn_like(down),
        }
        made |= _named(module, halves | {"alpha": held["alpha"]})
    return made


def _lokr(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    made: Tensors = {}
    for module, held in _linear(lora):
        up, down = held["lora_up"], held["lora_down"]
        small = {"lokr_w2_a": up[: len(up) // 4], "lokr_w2_b": down[:, : down.shape[1] // 4]}
        made |= _named(module, small | {"lokr_w1": torch.randn(4, 4), "alpha": held["alpha"]})
    return made


def _norms(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    made = dict(lora)
    for name in (name for name in keys if name.startswith("lora_unet") and "_norm" in name):
        module, _, parameter = name.rpartition(".")
        end = "diff" if parameter == "weight" else "diff_b"
        made[f"{module}.{end}"] = torch.randn(_weight(base, keys[name]).shape) * 0.05
    return made


def _half(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    return {key: value for key, value in lora.items() if key != f"{_PLACE}.lora_up.weight"}


def _one_layer(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    return {key.replace("down_blocks_2", "down_blocks_7"): value for key, value in lora.items()}


def _nan(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    lora[f"{_PLACE}.lora_down.weight"][0, 0] = float("nan")
    return lora


def _one_row(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    return lora | {f"{_PLACE}.lora_up.weight": lora[f"{_PLACE}.lora_up.weight"][:1]}


def _same(lora: Tensors, base: Tensors, keys: Keys) -> Tensors:
    return lora


def named(modules: Mapping[str, Tensors]) -> Tensors:
    """The tensors of modules under sd-scripts' keys."""
    return {key: value for module, held in modules.items() for key, value in _named(module, held).items()}


def _named(module: str, held: Tensors) -> Tensors:
    bare = ("alpha", "dora_scale", "hada", "lokr")
    return {
        f"{module}.{leaf}" if leaf.startswith(bare) else f"{module}.{leaf}.weight": value.float().contiguous()
        for leaf, value in held.items()
    }


_PLACE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
# By title: of which LoRA it is made, and how.
CASES: Mapping[str, tuple[str, Callable[[Tensors, Tensors, Keys], Tensors]]] = {
    "LoRA of UNet and text encoder": ("linear", _same),
    "without `alpha`": ("linear", _without_alpha),
    "LoCon: convolutions of 3x3 too": ("conv", _same),
    "LoCon with `lora_mid` (Tucker)": ("conv", _tucker),
    "DoRA (`dora_scale`)": ("linear", _dora),
    "LoHa": ("linear", _loha),
    "LoKr": ("linear", _lokr),
    "LoRA, norms' `diff` and `diff_b`": ("linear", _norms),
    "half of one LoRA is missing": ("linear", _half),
    "layers of one block are not in the base": ("linear", _one_layer),
    "NaN in a factor": ("linear", _nan),
    "a `lora_up` of one row": ("linear", _one_row),
}
FAULTY = tuple(CASES)[8:]
MAKERS: Mapping[str, Callable[[Tensors, Tensors, Keys], Tensors]] = {
    "without `alpha`": _without_alpha,
    "DoRA (`dora_scale`)": _dora,
    "LoHa": _loha,
    "LoKr": _lokr,
}
"""Those that fit any network of linear layers."""
