# SPDX-License-Identifier: Apache-2.0
"""Write docs/bases.md: `python tools/bases_page.py` merges a LoRA in every spelling into every network in every layout (minutes)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "cli")]

from tests.support.base_loras import SPELLINGS
from tests.support.base_merges import COMBINATIONS, TOLERANCE, Combination, check
from tests.support.bases import DIFFUSERS, KINDS, LAYOUTS
from tests.support.fp8_bases import FP8_COMBINATIONS, STYLES, WAYS, Fp8Combination, check_fp8

PAGE = ROOT / "docs" / "bases.md"
HEAD = """# Bases of diffusion networks

Made by `python tools/bases_page.py`, which merges a LoRA of every matrix and convolution, in every spelling, into every network in every
layout, and compares. Names, and which rows of a file's tensor are which parameter of diffusers, are those of diffusers' own conversions
(`tests/golden/layouts`), so that what is wanted is worked out without a rule of ours. `pytest tests/models/test_bases.py` tries a fixed
part, with `-m slow` all.

A merge is *right* if files, names, their order, types, shapes and metadata are the base's, every weight that the LoRA names changed as its
two factors say, within 1e-6 of the greatest change and one rounding, and every other byte is as it was. So one LoRA changes a single
file and a folder of diffusers alike: what is split in one and fused in the other, halves that lie the other way round, transposed ones.
`pytest -m nightly tests/models/test_single_file_peer.py` makes small models of eight families with diffusers, and lets its
`from_single_file` read the merged files: bit for bit the merged folders.
"""

IN_FP8 = """`text_encoders.clip_l.` is the first text encoder of a pipeline, and of HunyuanVideo's the second, as the base tells.

## Files in fp8

A LoRA merged into a release's file, and into one that ComfyUI saved, in fp8, and read again by ComfyUI's rules
(`convert_old_quants`, and its operations of mixed precision): weights that the LoRA changes are base and LoRA, but for the rounding of
the type; all others are what ComfyUI read before, bit for bit where they stay in fp8; no scale is left that it would not apply.
`fp8 again` keeps names, order and types.
"""


def place(path: Path, number: int) -> Path:
    """A folder for one merge."""
    folder = path / str(number)
    folder.mkdir(parents=True)
    return folder


def ran(folder: Path) -> list[tuple[Combination, float]]:
    """Every combination with the greatest difference; a wrong one is an error."""
    return [(one, check(one, place(folder, number))) for number, one in enumerate(COMBINATIONS)]


def ran_fp8(folder: Path) -> list[Fp8Combination]:
    """Every combination that ComfyUI reads right; a wrong one is an error."""
    for number, one in enumerate(FP8_COMBINATIONS):
        check_fp8(one, place(folder, number))
    return list(FP8_COMBINATIONS)


def cell(network: str, layout: str, found: Sequence[tuple[Combination, float]]) -> str:
    """How many merges are right."""
    return str(len([one for one, _ in found if (one.network, one.layout) == (network, layout)]))


def page(found: Sequence[tuple[Combination, float]], in_fp8: Sequence[Fp8Combination]) -> str:
    """The document."""
    worst = max(error for _, error in found)
    assert worst < TOLERANCE
    lines = [
        HEAD,
        f"diffusers {DIFFUSERS}. {len(found)} merges, all of them right; "
        f"{len(KINDS)} networks, {len(LAYOUTS)} layouts, {len(SPELLINGS)} spellings; greatest difference {worst:.0e}.\n",
        "## Layouts\n",
        "| layout | what it is |",
        "| --- | --- |",
        *(f"| {name} | {what} |" for name, what in LAYOUTS.items()),
        "",
        "## Spellings\n",
        "| spelling | a key |",
        "| --- | --- |",
        *(f"| {name} | {what} |" for name, what in SPELLINGS.items()),
        "",
        "## Merges that are right, of each spelling one\n",
        f"| network | release's prefix | text encoders | {' | '.join(LAYOUTS)} |",
        f"| --- | --- | --- |{' --- |' * len(LAYOUTS)}",
    ]
    for network, kind in KINDS.items():
        told = [kind.title, f"`{kind.prefix}`" if kind.prefix else "none", ", ".join(kind.encoders)]
        lines.append(f"| {' | '.join([*told, *(cell(network, layout, found) for layout in LAYOUTS)])} |")
    lines += [
        "",
        IN_FP8,
        f"| scales | what is in the file | {' | '.join(WAYS)} |",
        f"| --- | --- |{' --- |' * len(WAYS)}",
    ]
    for style, what in STYLES.items():
        counts = [str(len([one for one in in_fp8 if (one.style, one.way) == (style, way)])) for way in WAYS]
        lines.append(f"| {style} | {what} | {' | '.join(counts)} |")
    options = ", ".join(f"*{way}* is {options}" for way, options in OPTIONS.items())
    lines += ["", f"{options}.", ""]
    return "\n".join(lines)


OPTIONS = {
    "16 bits": "the default",
    "16 bits where touched": "`--only-touched`, which needs a ComfyUI that knows `comfy_quant`",
    "fp8 again": "`--quantized requantize`",
}


def main() -> None:
    """Merge everything and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(ran(Path(folder) / "plain"), ran_fp8(Path(folder) / "fp8")))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
