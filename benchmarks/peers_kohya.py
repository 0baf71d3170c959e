# SPDX-License-Identifier: Apache-2.0
"""kohya's sd-scripts beside this project, for `peers.py`: what each makes of the same files, measured in float64 here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peers_kohya_files import CASES, FAULTY, Tensors, change_of
from safetensors.torch import load_file, save_file

__all__ = [
    "Kohya",
    "apart",
    "extractions",
    "merges",
    "metadata",
    "norm",
    "off",
    "precisions",
    "resizes",
    "share",
    "sums",
    "units",
]

Runner = Callable[..., "object"]
_RUN = Path(__file__).with_name("kohya_run.py")
RIGHT = 1e-5  # of the whole change: what float32 leaves


@dataclass(frozen=True)
class Kohya:
    """A checkout of sd-scripts, the Python of its environment, what runs a process, and the files made for it."""

    python: Path
    checkout: Path
    call: Runner
    inputs: Path

    def run(self, *words: str | Path) -> object:
        """Run one of its scripts."""
        return self.call([self.python, _RUN, self.checkout, *words])

    def merge(self, base: Path, lora: Path, out: Path, *more: str) -> object:
        """merge_lora.py into a checkpoint."""
        asked = ["--sd_model", base, "--models", lora, "--ratios", "1", "--save_to", out, *more]
        return self.run("merge_lora.py", *asked)

    def surgery(self, *words: str | Path) -> object:
        """Run the command of this project."""
        return self.call([sys.executable, "-m", "surgery_cli", *words])

    @property
    def keys(self) -> dict[str, str]:
        """The checkpoint's name for each of a LoRA's."""
        return dict(json.loads((self.inputs / "names.json").read_text()))


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in tensors)) ** 0.5


def apart(after: Tensors, before: Tensors, changes: Tensors) -> float:
    """The distance of a whole file from base and change, as a share of the change."""
    left = [after[key].double() - (before[key].double() + changes.get(key, 0)) for key in before]
    return norm(left) / norm(changes.values())


def share(value: float) -> str:
    return "right" if value < RIGHT else f"{value:.1%} off"


def merges(kohya: Kohya, work: Path) -> Mapping[str, Mapping[str, str]]:
    """By case and program, what a merge into a checkpoint in float32 came to."""
    base = kohya.inputs / "float.safetensors"
    before, keys, rows = load_file(base), kohya.keys, dict[str, dict[str, str]]()
    usual = kohya.merge(base, kohya.inputs / "linear.lora.safetensors", work / "usual.safetensors")
    for number, (title, (source, make)) in enumerate(CASES.items()):
        print(title, file=sys.stderr, flush=True)
        torch.manual_seed(number)
        lora = work / f"case{number}.safetensors"
        tensors = make(load_file(kohya.inputs / f"{source}.lora.safetensors"), before, keys)
        save_file(tensors, lora, {"ss_network_module": "networks.lora"})
        changes = {} if title in FAULTY else change_of(tensors, before, keys)
        here, there = work / f"here{number}", work / f"there{number}.safetensors"
        ours = kohya.surgery("merge", base, lora, "-o", here)
        theirs = kohya.merge(base, lora, there)
        rows[title] = {
            "surgery": _outcome(ours, here / base.name, before, changes, ""),
            "kohya": _outcome(theirs, there, before, changes, usual.text),
        }
        for out in (here / base.name, there):
            out.unlink(missing_ok=True)
    return rows


def _outcome(ran: object, out: Path, before: Tensors, changes: Tensors, usual: str) -> str:
    if ran.code:
        place = re.search(r"mid_block_attentions_0|middle_block\.1|down_blocks_7|strata", ran.text)
        return ", ".join([f"refused, exit {ran.code}", *(["names the place"] if place else [])])
    after = load_file(out)
    words = [share(apart(after, before, changes))] if changes else []
    if not changes:
        changed = sum(not torch.equal(after[key], before[key]) for key in before)
        words.append(f"exit 0, {changed} of 204 weights changed")
        broken = sum(not bool(value.isfinite().all()) for value in after.values())
        words += [f"{broken} of them NaN"] * bool(broken)
    if not usual:
        said = "warn" in ran.text.lower()
    else:  # its log has a line for each thing passed over
        said = "no module found" in ran.text and "no module found" not in usual
    return ", ".join(words if words[0] == "right" else [*words, "a line in the log" if said else "no word of it"])


def precisions(kohya: Kohya, work: Path) -> Mapping[str, Mapping[str, str]]:
    """By the base's type and by program, the greatest distance from float64 in units in the last place, and the file's size."""
    keys, rows = kohya.keys, dict[str, dict[str, str]]()
    lora = kohya.inputs / "conv.lora.safetensors"
    for kind in ("fp16", "bf16"):
        base = kohya.inputs / f"{kind}.safetensors"
        before = load_file(base)
        changes = change_of(load_file(lora), before, keys)
        outs = {"surgery": work / f"precise-{kind}" / base.name}
        assert not kohya.surgery("merge", base, lora, "-o", outs["surgery"].parent).code
        asked = {
            "": [],
            f"`--save_precision {kind}`": ["--save_precision", kind],
            f"`--precision {kind}`": ["--precision", kind],
        }
        for title, words in asked.items():
            outs[f"kohya {title}".strip()] = out = work / f"precise-{kind}-{len(outs)}.safetensors"
            assert not kohya.merge(base, lora, out, *words).code
        for program, out in outs.items():
            after, size = load_file(out), out.stat().st_size / base.stat().st_size
            wrong = max(units(before[key], after[key], before[key].double() + changes[key]) for key in changes)
            moved = sum(
                not torch.equal(after[key].double(), before[key].double()) for key in before.keys() - changes.keys()
            )
            rows[f"{kind}: {program}"] = {
                "units in the last place": f"{wrong:.2f}",
                "size": f"{size:.2f} of the base",
                "other tensors changed": str(moved),
                "the base's metadata": metadata(base, out),
            }
    return rows


def units(before: torch.Tensor, after: torch.Tensor, exact: torch.Tensor) -> float:
    digits = 11 if before.dtype == torch.float16 else 8
    size = torch.maximum(before.double().abs(), exact.abs()).clamp_min(2.0**-14 if digits == 11 else 1e-30)
    spacing = torch.ldexp(torch.ones_like(size), torch.frexp(size)[1] - digits)
    return float(((after.double() - exact).abs() / spacing).max())


def metadata(base: Path, out: Path) -> str:
    from safetensors import safe_open

    with safe_open(base, "pt") as one, safe_open(out, "pt") as other:
        return "kept" if (one.metadata() or {}).items() <= (other.metadata() or {}).items() else "gone"


def _products(path: Path, before: Tensors, keys: Mapping[str, str]) -> Tensors:
    return change_of(load_file(path), before, keys)


def off(found: Tensors, exact: Tensors) -> float:
    assert found.keys() <= exact.keys(), sorted(found.keys() - exact.keys())[:3]
    return norm(found.get(key, 0) - value for key, value in exact.items()) / norm(exact.values())


def sums(kohya: Kohya, work: Path) -> Mapping[str, Mapping[str, str]]:
    """Two LoRAs of rank 8 added with two pairs of weights: how far the product is from the exact sum."""
    before, keys, rows = load_file(kohya.inputs / "float.safetensors"), kohya.keys, dict[str, dict[str, str]]()
    files = [kohya.inputs / f"{name}.lora.safetensors" for name in ("linear", "other")]
    one, other = (_products(file, before, keys) for file in files)
    for weights in ((1.0, 1.0), (0.7, 0.3)):
        exact = {key: weights[0] * one[key] + weights[1] * other[key] for key in one}
        asked = ["--models", *files, "--ratios", *map(str, weights)]
        for number, (title, words) in enumerate(
            (
                ("kohya `merge_lora`", ["merge_lora.py", *asked]),
                ("kohya `merge_lora --concat`", ["merge_lora.py", *asked, "--concat"]),
                ("kohya `svd_merge_lora --new_rank 16`", ["svd_merge_lora.py", *asked, "--new_rank", "16"]),
                ("kohya `svd_merge_lora --new_rank 8`", ["svd_merge_lora.py", *asked, "--new_rank", "8"]),
                ("`surgery combine`", []),
                ("`surgery combine --rank 8`", ["--rank", "8"]),
            )
        ):
            out = work / f"sum-{number}-{weights[0]:g}.safetensors"
            if title.startswith("kohya"):
                ran = kohya.run(*words, "--save_to", out)
            else:
                weighted = [f"{file}={weight}" for file, weight in zip(files, weights, strict=True)]
                ran = kohya.surgery("combine", *weighted, "-o", out, *words)
            assert not ran.code, ran.text
            rows.setdefault(title, {})[f"{weights[0]:g} and {weights[1]:g}"] = share(
                off(_products(out, before, keys), exact)
            )
    return rows


def resizes(kohya: Kohya, work: Path) -> Mapping[str, Mapping[str, str]]:
    """Files resized to rank 4 or 2: the part of the change that is lost, against the least possible."""
    before, keys, rows = load_file(kohya.inputs / "float.safetensors"), kohya.keys, dict[str, dict[str, str]]()
    for title in (
        "LoRA of UNet and text encoder",
        "LoCon: convolutions of 3x3 too",
        "LoCon with `lora_mid` (Tucker)",
        "LoHa",
    ):
        number = list(CASES).index(title)
        source, exact = work / f"case{number}.safetensors", {}
        exact = _products(source, before, keys)
        least = norm(torch.linalg.svdvals(value.flatten(1))[4:] for value in exact.values()) / norm(exact.values())
        here, there = work / f"resized{number}.safetensors", work / f"resized{number}-there.safetensors"
        ran = {
            "surgery": (kohya.surgery("resize", source, "--rank", "4", "-o", here), here),
            "kohya": (kohya.run("resize_lora.py", "--model", source, "--new_rank", "4", "--save_to", there), there),
        }
        rows[title] = {"least": f"{least:.4f}"} | {
            program: _resized(job, out, before, keys, exact) for program, (job, out) in ran.items()
        }
    return rows


def _resized(ran: object, out: Path, before: Tensors, keys: Mapping[str, str], exact: Tensors) -> str:
    if ran.code:
        return f"refused, exit {ran.code}"
    tensors = load_file(out)
    rank = max(
        (len(value) for key, value in tensors.items() if key.endswith(("lora_down.weight", "hada_w1_b"))), default=0
    )
    try:
        return f"{off(change_of(tensors, before, keys), exact):.4f} at rank {rank}"
    except RuntimeError:  # factors that do not fit each other
        return f"exit 0, a file whose factors do not fit, rank {rank}"


_KINDS = (
    ("text encoder, matrices", r"^cond_.*layers.*(proj|fc\d)\.weight"),
    ("text encoder, embeddings", r"^cond_.*embedding"),
    ("biases", r"bias$"),
    ("norms", r"norm|(in|out)_layers\.0|\.out\.0"),
    ("UNet, linear layers and 1x1", r"transformer_blocks|proj_(in|out)"),
    ("UNet, other layers", r"time_embed|input_blocks\.0\.|model\.out\.|emb_layers|skip"),
    ("UNet, convolutions of 3x3", r""),
)


def extractions(kohya: Kohya, work: Path) -> Mapping[str, Mapping[str, str]]:
    """A LoRA of rank 4 out of a fine-tune of rank 2: by kind of parameter, the part of the change that it lacks."""
    base, tuned = (kohya.inputs / f"{name}.safetensors" for name in ("float", "tuned"))
    before, after, keys = load_file(base), load_file(tuned), kohya.keys
    exact = {key: after[key].double() - before[key].double() for key in before if not key.startswith("first_stage")}
    asked = ["extract_lora_from_models.py", "--model_org", base, "--model_tuned", tuned, "--dim", "4"]
    held: dict[str, Tensors] = {}
    for title, words in (
        ("kohya", []),
        ("`--conv_dim 4`", ["--conv_dim", "4"]),
    ):
        out = work / f"extracted{len(held)}.safetensors"
        ran = kohya.run(*asked, *words, "--save_to", out)
        assert not ran.code, ran.text
        held[title] = _products(out, before, keys)
    adapter, merged = work / "extracted-here", work / "extracted-merged"
    ran = kohya.surgery("extract-lora", base, tuned, "--rank", "4", "--allow-loss", "-o", adapter)
    assert not ran.code, ran.text
    ran = kohya.surgery("merge", base, adapter, "-o", merged)
    assert not ran.code, ran.text
    found = load_file(merged / base.name)
    held = {"surgery": {key: found[key].double() - before[key].double() for key in exact}} | held
    rows: dict[str, dict[str, str]] = {}
    for key in exact:
        title = next(title for title, pattern in _KINDS if re.search(pattern, key))
        rows.setdefault(title, {})[key] = ""
    return {
        title: {
            program: f"{norm(change.get(key, 0) - exact[key] for key in names) / norm(exact[key] for key in names):.1%}"
            for program, change in held.items()
        }
        for title, names in rows.items()
    }
