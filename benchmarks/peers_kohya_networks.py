# SPDX-License-Identifier: Apache-2.0
"""kohya's scripts for Flux, Stable Diffusion 3 and XL beside this project, for `peers.py`: merges, sums, smaller ranks.

The references are float64, of `peers_kohya_files`; which rows are which parameter of diffusers' is diffusers' own word
(``tests/golden/layouts/rows.json``).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import ROOT
from peers_kohya import Kohya, apart, metadata, norm, off, share, units
from peers_kohya_files import MAKERS, Keys, Tensors, Where, change_of, factors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

__all__ = ["BLOCKS", "Network", "Rows", "as_diffusers", "judged", "merges", "precisions", "resizes", "sums"]

Rows = Mapping[str, Mapping[str, str]]
_PARTS = {"flux": "unet", "flux-clip_l": "text_encoder", "flux-t5xxl": "text_encoder_3"}
_TITLES = {"flux": "Flux", "sdxl": "XL", "sd3": "SD 3"}
_SAID = re.compile(r"no module found|Unused keys|Unsuppored keys|were converted|not supported|warning:")
_WIDTH = 3072  # of the published Flux, as the golden rows have it


@dataclass(frozen=True)
class Network:
    """A small network that `kohya_networks` made: its tensors, and where in them a LoRA's weights are."""

    folder: Path
    name: str
    base: Tensors
    keys: Keys

    @classmethod
    def of(cls, folder: Path, name: str) -> Network:
        """Read its files."""
        files = _PARTS if name == "flux" else (name,)
        base = {key: value for file in files for key, value in load_file(folder / f"{file}.safetensors").items()}
        keys: dict[str, Where] = json.loads((folder / f"{name}.json").read_text())
        if name == "flux":
            golden = json.loads((ROOT / "tests/golden/layouts/rows.json").read_text())["models"]["flux"]["rows"]
            width = len(base["img_in.weight"])
            for parameter, where in golden.items():
                parts = where if isinstance(where, list) else [[where, 0, _WIDTH * _WIDTH]]
                scaled = [(tensor, start * width // _WIDTH, stop * width // _WIDTH) for tensor, start, stop in parts]
                keys[f"transformer.{parameter}"] = scaled
            for file, part in (("flux-clip_l", "text_encoder"), ("flux-t5xxl", "text_encoder_2")):
                keys |= {f"{part}.{key}": key for key in load_file(folder / f"{file}.safetensors")}
        return cls(folder, name, base, keys)

    def lora(self, kind: str) -> Path:
        """A file that its trainer wrote."""
        return self.folder / f"{self.name}-{kind}.lora.safetensors"

    def change(self, lora: Tensors | Path) -> Tensors:
        """What a file changes, in float64."""
        return change_of(lora if isinstance(lora, dict) else load_file(lora), self.base, self.keys)


def as_diffusers(flux: Network, rank: Callable[[str], int], pattern: str) -> Tensors:
    """A LoRA in diffusers' names, of the weights that `pattern` finds."""
    torch.manual_seed(11)
    made: Tensors = {}
    for name, where in flux.keys.items():
        key = name.removesuffix(".weight")
        if not re.search(pattern, name) or key == name or "norm_" in key.replace("norm_out", ""):
            continue
        rows = sum(min(stop, len(flux.base[tensor])) - start for tensor, start, stop in where)
        columns = flux.base[where[0][0]].shape[1]
        made[f"{key}.lora_A.weight"] = torch.randn(rank(key), columns) * 0.05
        made[f"{key}.lora_B.weight"] = torch.randn(rows, rank(key)) * 0.05
    return made


BLOCKS = r"^transformer\..*transformer_blocks"


def _refused(ran: object) -> str:
    named = re.search(r"lora_(unet|te\d?)_\w+|transformer_blocks|(double|single)_blocks|KeyError: '", ran.text[-600:])
    return ", ".join([f"refused, exit {ran.code}", *(["names the place"] if named else [])])


def judged(ran: object, wrong: Callable[[], float]) -> str:
    """Refused, right, or how far off and whether a word was said."""
    if ran.code:
        return _refused(ran)
    word = share(wrong())
    return word if word == "right" else f"{word}, {'a line in the log' if _SAID.search(ran.text) else 'no word of it'}"


# By title: the network, the LoRA, what is made of it.
_MERGES: Mapping[str, tuple[str, str, str]] = {
    "Flux: LoRA of it, CLIP and T5": ("flux", "one", ""),
    "Flux: ranks of 2 to 8, `img_in` and the like too": ("flux", "dims", ""),
    "Flux: without `alpha`": ("flux", "one", "without `alpha`"),
    "Flux: DoRA": ("flux", "one", "DoRA (`dora_scale`)"),
    "Flux: LoHa": ("flux", "one", "LoHa"),
    "Flux: LoKr": ("flux", "one", "LoKr"),
    "SD 3: LoRA of it and both CLIPs": ("sd3", "one", ""),
    "SD 3: ranks of 2 to 8, `x_embedder` and the like too": ("sd3", "dims", ""),
    "XL: LoRA of UNet and text encoders": ("sdxl", "one", ""),
    "XL: LoCon": ("sdxl", "conv", ""),
    "XL: DoRA": ("sdxl", "one", "DoRA (`dora_scale`)"),
    "XL: LoHa": ("sdxl", "one", "LoHa"),
}


def merges(kohya: Kohya, work: Path) -> Rows:
    """By case and program, what a merge into a checkpoint in float32 came to."""
    networks = {name: Network.of(kohya.inputs, name) for name in _TITLES}
    rows: dict[str, dict[str, str]] = {}
    for number, (title, (name, kind, made)) in enumerate(_MERGES.items()):
        print(title, file=sys.stderr, flush=True)
        network, lora = networks[name], work / f"network{number}.safetensors"
        torch.manual_seed(number)
        tensors = load_file(network.lora(kind))
        tensors = MAKERS[made](tensors, network.base, network.keys) if made else tensors
        save_file(tensors, lora, {"ss_network_module": "networks.lora"})
        rows[title] = _merged(kohya, network, lora, network.change(tensors), work / f"network{number}")
    flux = networks["flux"]
    for title, ranks, pattern in (
        ("Flux: LoRA in diffusers' names", lambda _: 8, BLOCKS),
        ("Flux: the same, and `x_embedder`, `norm_out` and the like", lambda _: 8, r"^transformer\."),
    ):
        lora = work / f"{len(rows)}.safetensors"
        save_file(tensors := as_diffusers(flux, ranks, pattern), lora)
        rows[title] = _merged(kohya, flux, lora, flux.change(tensors), work / f"diffusers{len(rows)}", "--diffusers")
    return rows


def _merged(kohya: Kohya, network: Network, lora: Path, changes: Tensors, out: Path, *more: str) -> dict[str, str]:
    """Merge with both: the files of Flux are three, which its script takes at once."""
    out.mkdir()
    asked: list[str | Path] = ["--models", lora, "--ratios", "1", *more]
    asked += ["--save_to", out / f"{network.name}.safetensors"]
    if network.name == "flux":
        words: list[str | Path] = ["flux_merge_lora.py", "--flux_model", network.folder / "flux.safetensors", *asked]
        for part in () if more else ("clip_l", "t5xxl"):
            paths = [network.folder / f"flux-{part}.safetensors", f"--{part}_save_to", out / f"flux-{part}.safetensors"]
            words += [f"--{part}", *paths]
    else:
        words = ["sdxl_merge_lora.py", "--sd_model", network.folder / f"{network.name}.safetensors", *asked]
    theirs = kohya.run(*words) if network.name != "sd3" else None
    ours = []
    there = _parts_of(lora)
    files = (
        {file: part for file, part in _PARTS.items() if part in there} if network.name == "flux" else {network.name: ""}
    )
    for file, part in files.items():
        left_out = [word for other in sorted(there - {part}) for word in ("--without", f"{other}:*")] if part else []
        made, asked = out / f"here-{file}", [network.folder / f"{file}.safetensors", lora, *left_out]
        ours.append((kohya.surgery("merge", *asked, "-o", made), made / f"{file}.safetensors"))
    merged = [path for ran, path in ours if not ran.code]
    worst = next((ran for ran, _ in ours if ran.code), ours[0][0])
    return {
        "surgery": judged(worst, lambda: _off_files(merged, network, changes)),
        "kohya": judged(theirs, lambda: _off_files(sorted(out.glob("*.safetensors")), network, changes))
        if theirs
        else "no script for it",
    }


def _parts_of(lora: Path) -> set[str]:
    """The networks of Flux that a file changes."""
    names = {"lora_te1_": "text_encoder", "lora_te3_": "text_encoder_3"}
    return {names.get(key[: len("lora_te1_")], "unet") for key in load_file(lora)}


def _off_files(files: Iterable[Path], network: Network, changes: Tensors) -> float:
    after = {key: value for file in files for key, value in load_file(file).items()}
    if missing := changes.keys() - after.keys():
        print("not written:", sorted(missing)[:3], file=sys.stderr)
    before = {key: network.base[key] for key in after}
    return apart(after, before, changes) if not missing else 1.0


def precisions(kohya: Kohya, work: Path) -> Rows:
    """Flux in bfloat16: the greatest distance from float64 in units in the last place, and what becomes of the file."""
    flux, lora = Network.of(kohya.inputs, "flux"), work / "network-unet.safetensors"
    base = kohya.inputs / "flux-bf16.safetensors"
    before = load_file(base)
    tensors = {key: value for key, value in load_file(flux.lora("one")).items() if key.startswith("lora_unet")}
    save_file(tensors, lora)
    exact = change_of(tensors, before, flux.keys)
    outs = {"surgery": work / "network-precise" / base.name}
    ran = kohya.surgery("merge", base, lora, "-o", outs["surgery"].parent)
    assert not ran.code, ran.text
    asked = ["flux_merge_lora.py", "--flux_model", base, "--models", lora, "--ratios", "1"]
    for title, words in (
        ("", []),
        ("`--save_precision bf16`", ["--save_precision", "bf16"]),
        ("`--precision bf16`", ["--precision", "bf16"]),
    ):
        outs[f"kohya {title}".strip()] = out = work / f"network-precise{len(outs)}.safetensors"
        ran = kohya.run(*asked, "--save_to", out, *words)
        assert not ran.code, ran.text
    rows: dict[str, dict[str, str]] = {}
    for program, out in outs.items():
        after = load_file(out)
        wrong = max(units(before[key], after[key], before[key].double() + exact[key]) for key in exact)
        rows[f"Flux, bf16: {program}"] = {
            "units in the last place": f"{wrong:.2f}",
            "size": f"{out.stat().st_size / base.stat().st_size:.2f} of the base",
            "the base's metadata": metadata(base, out),
        }
    return rows


_WEIGHTS = (("one", 1.0, "other", 1.0), ("one", 0.7, "other", 0.3), ("one", 1.0, "dims", 1.0))


def sums(kohya: Kohya, work: Path) -> Rows:
    """Two LoRAs added with two pairs of weights, and two of other ranks: how far the product is from the exact sum."""
    rows: dict[str, dict[str, str]] = {}
    for name, script in (("flux", "flux_merge_lora"), ("sdxl", "sdxl_merge_lora")):
        network = Network.of(kohya.inputs, name)
        dims = "conv" if name == "sdxl" else "dims"
        for first, weight, second, other in _WEIGHTS:
            files = [network.lora(first), network.lora(second.replace("dims", dims))]
            column = "1 and 1, other ranks" if second == "dims" else f"{weight:g} and {other:g}"
            exact: Tensors = {}
            for file, times in zip(files, (weight, other), strict=True):
                for key, value in network.change(file).items():
                    exact[key] = exact.get(key, 0) + times * value
            asked = ["--models", *files, "--ratios", str(weight), str(other)]
            for title, words in (
                (f"kohya `{script}`", [f"{script}.py", *asked]),
                (f"kohya `{script} --concat`", [f"{script}.py", *asked, "--concat"]),
                ("kohya `svd_merge_lora --new_rank 16`", ["svd_merge_lora.py", *asked, "--new_rank", "16"]),
                ("`surgery combine`", []),
            ):
                out = work / f"network-sum{sum(map(len, rows.values()))}.safetensors"
                if words:
                    ran = kohya.run(*words, "--save_to", out)
                else:
                    weighted = [f"{file}={times:g}" for file, times in zip(files, (weight, other), strict=True)]
                    ran = kohya.surgery("combine", *weighted, "-o", out)
                print(name, column, title, file=sys.stderr, flush=True)
                label = f"{_TITLES[name]}: {title}"
                rows.setdefault(label, {})[column] = (
                    _refused(ran) if ran.code else share(_off_product(network, out, exact))
                )
    return rows


def _off_product(network: Network, out: Path, exact: Tensors) -> float:
    return off(network.change(out), exact)


# By title: the network, the LoRA, what is made of it.
_RESIZES: Mapping[str, tuple[str, str, str]] = {
    "Flux: LoRA of it, CLIP and T5": ("flux", "one", ""),
    "Flux: ranks of 2 to 8": ("flux", "dims", ""),
    "Flux: DoRA": ("flux", "one", "DoRA (`dora_scale`)"),
    "Flux: LoKr": ("flux", "one", "LoKr"),
    "Flux: LoRA in diffusers' names": ("flux", "", ""),
    "Flux: the same, alpha in the header": ("flux", "", "header"),
    "SD 3: LoRA": ("sd3", "one", ""),
    "SD 3: ranks of 2 to 8": ("sd3", "dims", ""),
    "XL: LoCon": ("sdxl", "conv", ""),
}
_HEADER = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 2.0})}


def resizes(kohya: Kohya, work: Path) -> Rows:
    """Files resized to rank 4: the part of the change that is lost, against the least possible."""
    networks = {name: Network.of(kohya.inputs, name) for name in _TITLES}
    rows: dict[str, dict[str, str]] = {}
    for number, (title, (name, kind, made)) in enumerate(_RESIZES.items()):
        print(title, file=sys.stderr, flush=True)
        network, source = networks[name], work / f"network-big{number}.safetensors"
        torch.manual_seed(number)
        tensors = load_file(network.lora(kind)) if kind else as_diffusers(network, lambda _: 8, BLOCKS)
        tensors = MAKERS[made](tensors, network.base, network.keys) if made in MAKERS else tensors
        times = 0.25 if made == "header" else 1.0
        save_file(tensors, source, _HEADER if made == "header" else {"ss_network_dim": "8"})
        exact = {key: times * value for key, value in network.change(tensors).items()}
        ours, theirs = work / f"network-small{number}.safetensors", work / f"network-small{number}-there.safetensors"
        jobs = {
            "surgery": (kohya.surgery("resize", source, "--rank", "4", "-o", ours), ours),
            "kohya": (kohya.run("resize_lora.py", "--model", source, "--new_rank", "4", "--save_to", theirs), theirs),
        }
        rows[title] = {"least": _least(network, tensors, times, exact)} | {
            program: _resized(ran, out, network, exact) for program, (ran, out) in jobs.items()
        }
    return rows


def _least(network: Network, tensors: Tensors, times: float, exact: Tensors) -> str:
    """The best of rank 4, module by module; of DoRA, whose magnitudes a file can keep as they are, none is known."""
    if any("dora_scale" in key for key in tensors):
        return "-"
    lost = 0.0
    for module, _ in factors(tensors):
        alone = {key: value for key, value in tensors.items() if key.startswith(f"{module}.")}
        values = torch.cat([value.flatten(1) for value in network.change(alone).values()])
        lost += times**2 * float(torch.linalg.svdvals(values)[4:].square().sum())
    return f"{lost**0.5 / norm(exact.values()):.4f}"


def _resized(ran: object, out: Path, network: Network, exact: Tensors) -> str:
    if ran.code:
        return _refused(ran)
    with safe_open(out, "pt") as file:
        said = (file.metadata() or {}).get("lora_adapter_metadata")
    tensors = load_file(out)
    changed = network.change(tensors)
    if said and not any(key.endswith(".alpha") for key in tensors):
        stated = json.loads(said)
        changed = {
            key: value * stated["transformer.lora_alpha"] / stated["transformer.r"] for key, value in changed.items()
        }
    rank = max((len(value) for key, value in tensors.items() if re.search(r"lora_(down|A)|w2_b", key)), default=0)
    return f"{off(changed, exact):.4f} at rank {rank}"
