# SPDX-License-Identifier: Apache-2.0
"""Write docs/images/first.svg: `python tools/first_picture.py` runs the shipped example's jobs, and draws what came out."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats")]

import surgery
from surgery_formats.text import nbytes

PICTURE = ROOT / "docs" / "images" / "first.svg"
_WIDTH, _ROW, _TOP = 900, 66, 38
_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .small { font-size: 12px; fill: #59636e }
  .command { font: 600 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #0550ae }
  .box { fill: #f6f8fa; stroke: #8c959f }
  .made { fill: #dafbe1; stroke: #1a7f37 }
  .line { stroke: #59636e; stroke-width: 1.5; fill: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .command { fill: #79c0ff }
    .box { fill: #161b22; stroke: #656c76 }
    .made { fill: #12261e; stroke: #3fb950 }
    .line { stroke: #9198a1 }
  }
"""


@dataclass(frozen=True)
class Job:
    """One row of the picture: inputs with their bytes, a command, what it made, and what was measured of that."""

    inputs: tuple[tuple[str, int], ...]
    command: str
    made: str
    size: str
    measured: tuple[str, str]


def jobs(out: Path, examples: Path = ROOT / "examples") -> list[Job]:
    """Run them; nothing but times is left out, so that the same tree draws the same picture."""
    base, lora, tuned = (examples / name for name in ("base", "lora", "tuned"))
    cost = surgery.report(lora, base=base, tasks=(100,)).adapters[0]
    (hundred,) = cost.tasks
    of_base, of_lora = ("base", hundred.copies_nbytes // 100), ("LoRA", cost.nbytes)
    merged = surgery.merge(base, lora, output=out / "merged")
    classes = merged.ledger.classes
    extracted = surgery.extract_lora(base, tuned, output=out / "extracted", rank=64, factors="int4")
    bound = max(one["bound"] for one in extracted.as_json()["tensors"].values() if "bound" in one)
    converted = surgery.convert(lora, "mlx", output=out / "mlx")
    exact = sum(entry.outcome == "exact" for entry in converted.entries)
    graphs = surgery.export_onnx(base, lora, output=out / "onnx")
    described = sum(size for name, size in graphs.files.items() if name.endswith(".onnx"))
    shared = graphs.ledger.classes["referenced"]
    return [
        Job(
            (of_base, of_lora),
            "merge",
            "merged model",
            nbytes(merged.nbytes),
            (
                f"{classes['updated']} tensors updated, {classes['copied']} copied, none left over",
                f"{merged.ledger.survival:.2%} of the update survives bfloat16",
            ),
        ),
        Job(
            (of_base, ("full fine-tune", extracted.tuned_nbytes)),
            "extract-lora",
            "LoRA of rank 64",
            nbytes(extracted.adapter_nbytes),
            (
                f"{extracted.tuned_nbytes / extracted.adapter_nbytes:.2f} times smaller than the full copy",
                f"leaves {extracted.residual:.0%} out, {bound:.4f} times the least",
            ),
        ),
        Job(
            (of_lora,),
            "convert",
            "LoRA for MLX",
            nbytes(converted.nbytes),
            (
                f"{exact} of {len(converted.entries)} updates exact",
                f"largest error {converted.max_error:g}, read back from disk",
            ),
        ),
        Job(
            (of_base, of_lora),
            "export-onnx",
            "ONNX graphs",
            nbytes(described),
            (
                f"{graphs.nodes} nodes; {shared} weights as the base has them,",
                f"{graphs.ledger.classes['updated']} merged, in files beside the graphs",
            ),
        ),
        Job(
            (of_base, of_lora),
            "report",
            "100 tasks",
            nbytes(hundred.shared_nbytes),
            (f"instead of {nbytes(hundred.copies_nbytes)} in full copies:", f"{hundred.times:.2f} times smaller"),
        ),
    ]


def draw(rows: list[Job]) -> str:
    """The picture, in light and dark; a description for those who do not see it."""
    told = "; ".join(
        f"{job.command} {' and '.join(name for name, _ in job.inputs)}: {job.made}, {job.size}, {' '.join(job.measured)}"
        for job in rows
    )
    height = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t d">',
        '<title id="t">What surgery makes of the shipped example</title>',
        f'<desc id="d">{escape(told)}</desc>',
        f"<style>{_STYLE}</style>",
        '<text class="small" x="10" y="20">files in</text>',
        '<text class="small" x="455" y="20">files out</text>',
        '<text class="small" x="620" y="20">measured while it was made</text>',
    ]
    for number, job in enumerate(rows):
        top = _TOP + number * _ROW
        parts += _row(job, top)
    return "\n".join([*parts, "</svg>", ""])


def _row(job: Job, top: int) -> list[str]:
    middle, parts = top + 25, []
    for place, (name, size) in enumerate(job.inputs):
        parts += _box(10 + 135 * place, top, 125, name, nbytes(size), "box")
    start = 10 + 135 * len(job.inputs)
    parts += [
        f'<path class="line" d="M{start} {middle} H447 m-7 -5 l7 5 l-7 5"/>',
        f'<text class="command" x="{(start + 445) // 2}" y="{middle - 8}" text-anchor="middle">{job.command}</text>',
        *_box(455, top, 150, job.made, job.size, "made"),
    ]
    return [
        *parts,
        *(
            f'<text class="{kind}" x="620" y="{top + y}">{escape(line)}</text>'
            for line, y, kind in zip(job.measured, (21, 39), ("small", "small"), strict=True)
        ),
    ]


def _box(left: int, top: int, width: int, name: str, size: str, kind: str) -> list[str]:
    return [
        f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="50" rx="6"/>',
        f'<text x="{left + 12}" y="{top + 21}">{escape(name)}</text>',
        f'<text class="small" x="{left + 12}" y="{top + 39}">{size}</text>',
    ]


def main() -> None:
    """Run all, and draw it."""
    with tempfile.TemporaryDirectory(prefix="surgery-picture-") as folder:
        picture = draw(jobs(Path(folder)))
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
