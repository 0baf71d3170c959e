# SPDX-License-Identifier: Apache-2.0
"""Write examples/demo.ipynb: the main jobs on the shipped example, as cells whose results show themselves.

python tools/notebook.py

The notebook is stored without outputs; `tests/test_notebook.py` runs it, and holds the file to this program.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["CELLS", "NOTEBOOK", "render"]

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "demo.ipynb"

# Pairs: what is said, and the code under it.
CELLS = (
    (
        """# Surgery on a small language model

A model of 1.5 M parameters that has read Python code, and a LoRA that teaches it to write documentation. Each cell is one verb on files;
what it returns shows itself. Outputs go to a temporary folder.""",
        """from pathlib import Path
from tempfile import mkdtemp

import surgery

out = Path(mkdtemp())
base, lora = surgery.open("base"), surgery.open("lora")
surgery.inspect(lora)""",
    ),
    (
        """## What does it save?

Beside a full copy of the model for each task.""",
        """surgery.report(lora, base=base, tasks=100)""",
    ),
    (
        """## Merge

Every tensor is accounted for. *Kept* is what rounding to bfloat16 left of the update.""",
        """merged = surgery.merge(base, lora, output=out / "merged")
merged""",
    ),
    (
        """Weights are numbers: half of one adapter, and a little of another.""",
        """mixed = surgery.merge(base, [lora * 0.5, surgery.open("dora") * 0.3], output=out / "mixed")
assert mixed.ledger.classes == merged.ledger.classes
mixed.ledger.classes""",
    ),
    (
        """## Extract

The other direction: the LoRA nearest to what a full fine-tune changed. No rank 16 holds more of it.""",
        """surgery.extract_lora(base, "tuned", rank=16, output=out / "small")""",
    ),
    (
        """## Who can load it?""",
        """surgery.check(base, lora)""",
    ),
    (
        """mlx-lm wants a format of its own. What is written is read back, and must change every weight as the original does.""",
        """surgery.convert(lora, "mlx", output=out / "lora-mlx")""",
    ),
    (
        """## Export, and run

A graph over the checkpoint's own bytes, with the adapter merged. `verify` compares it with the same model computed apart from it.""",
        """surgery.export_onnx(base, merge=lora, output=out / "graph")
assert surgery.verify(out / "graph", against=base, adapters=lora).difference < 1e-3
print(surgery.run(out / "graph", "The with statement", device="cpu", max_new=24).texts[0].text)""",
    ),
    (
        """## When something does not fit

It is refused by name, and nothing is written.""",
        """try:
    surgery.merge(base, "prompt", output=out / "never")
except surgery.FitError as error:
    print(error.message)
    print(error.hint)
assert not (out / "never").exists()""",
    ),
)


def render() -> NotebookNode:
    """The notebook, without outputs and with cell ids that do not change."""
    from nbformat import v4

    cells = []
    for number, (text, code) in enumerate(CELLS):
        cells.append(v4.new_markdown_cell(text, id=f"text-{number}"))
        cells.append(v4.new_code_cell(code, id=f"code-{number}"))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return v4.new_notebook(cells=cells, metadata=kernel)


if __name__ == "__main__":
    import nbformat

    nbformat.write(render(), NOTEBOOK)
