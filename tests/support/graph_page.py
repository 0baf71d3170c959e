# SPDX-License-Identifier: Apache-2.0
"""docs/exporters.md, made of what is measured of every golden graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.graph_pairs import Pair
from tests.support.graph_table import Measured, Slotted

__all__ = ["PAGE", "line_of", "other_line", "page", "without_figures"]

PAGE = Path(__file__).parents[2] / "docs" / "exporters.md"
BASES = {
    "llama": "Llama", "qwen2": "Qwen2, tied, biases", "gpt2": "GPT-2", "bert": "BERT", "vit": "ViT",
    "resnet": "ResNet, batch norms folded", "unet": "UNet",
}  # fmt: skip
HEAD = """# Graphs of every exporter

Made by `python tools/exporters_page.py`, which takes every graph of `tests/golden/onnx_graphs` and those of `export-onnx`, and does
with them what [graphs.md](graphs.md) describes. `pytest tests/onnx/test_exporters.py` measures the same. The models are tiny and random;
layouts, names, operators and types are the exporters' own. Adapters are PEFT's LoRAs of all linear layers (of convolutions in the ResNet,
of both in the UNet), and so is every expected answer.

- **located**: weights that the adapter changes and that are found in the graph by their values, wholly; of codes, how far those are
  from the weights.
- **merged**: the greatest difference of `merge GRAPH ADAPTER --base BASE` from PEFT's answer; in brackets that of the graph itself from
  its base's answer, which is what its type costs; of codes, how far those are from PEFT's merged weights.
- **elsewhere**: bytes of all files that changed outside the tensors of those weights.
- **slots**: whether the graph of `insert GRAPH ADAPTER --base BASE` without an adapter answers with the same bits, its nodes as they
  are; in brackets the difference where onnxruntime fuses other nodes than before; then the difference with the adapter from PEFT's answer.
- **folded**: the same after `fold` put the slots into the weights.

A graph is refused for a base that it was not made of: every one was tried with another model of the same names and sizes.
"""
OTHERS = """`head` is a LoRA of q, the embedding and the head, `dora` a DoRA, `rslora` one of k and o with rsLoRA's scale, `light` one of a
thirtieth of the strength: a graph with ranges of activations (QDQ) was calibrated for its base, and what an adapter moves out of these
ranges is cut off.
"""
SEEN = """## What exporters and runtimes do

- torch's exporter makes a RotaryEmbedding of a Llama's rotation for opset 23 that [runs with one row
  only](../findings/torch_rotary_tables_of_one_row.sh), unless positions are an input (2.13.0); `dynamo-llama` has them.
- onnxruntime-genai's builder [leaves layers out](../findings/genai_takes_width_of_vocabulary_for_head.sh) of a model whose
  feed-forward part is as wide as its vocabulary (0.18.0).
- onnxruntime's convolution of no channels [gives NaN](../findings/onnxruntime_empty_convolution_keeps_garbage.sh) where NaN or Inf lay in
  memory (1.22 to 1.31.1), so slots beside convolutions have a kernel of zeros.
- onnxruntime's Attention (opset 23) of earlier keys [cannot run](../findings/onnxruntime_attention_wants_present.sh) without both
  `present_*` outputs (1.31.1, 1.32.0), so graphs name them where nothing reads them, too.
- Olive lists every optional slot twice among the inputs (0.13.0): onnxruntime runs it, `onnx.checker` refuses it.
- onnxruntime on the CPU computes float16 in float32 and rounds where its casts are: an empty slot in a graph of MatMulNBits in float16
  (transformers.js' `q4f16`) moved rounding by 0.004 of answers of 3. In float32 the bits stay.
"""


def without_figures(line: str) -> str:
    """A line of which the measured numbers may differ from machine to machine."""
    line = re.sub(r"\d(?:\.\d+)?e-\d+|\b0\.\d+\b|\b[1-9]\.\d\b", "#", line)
    return line.replace("the same bits (#)", "the same bits")  # which nodes are fused is up to the version


def line_of(pair: Pair, adapter: str, measured: Measured | None, slotted: Slotted) -> str:
    """One line of the first table."""
    base = f"{BASES[pair.base_name]}, {pair.dtype}" + (f", adapter `{adapter}`" if adapter != "lora" else "")
    cells = [f"`{pair.name}`", f"{pair.exporter} ({pair.version})", base]
    if measured is None:
        cells += ["", "has the adapter in it", ""]
    else:
        codes = f", codes within {measured.steps:.2f} of a step" if measured.steps else ""
        after = f", codes within {measured.steps_after:.2f} of a step" if measured.steps else ""
        cells.append(f"{measured.located} of {measured.weights}{codes}")
        cells.append(f"{_figure(measured.after)} ({_figure(measured.before)}){after}")
        cells.append(str(measured.elsewhere))
    if slotted.refused:
        cells += [slotted.refused, ""]
    else:
        fused = f" ({_figure(slotted.fused)})" if slotted.fused else ""
        silent = "the same bits" if slotted.silent else "differs"
        cells.append("" if slotted.active is None else f"{silent}{fused}; {_figure(slotted.active)}")
        cells.append("codes stay" if slotted.folded is None else _figure(slotted.folded))
    return f"| {' | '.join(cells)} |"


def _figure(value: float) -> str:
    if value >= 0.1:
        return f"{value:.1f}"
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def other_line(name: str, measured: Mapping[str, Measured]) -> str:
    """One line of the second table."""
    cells = [f"`{adapter}` {one.located} of {one.weights}: {_figure(one.after)}" for adapter, one in measured.items()]
    return f"| `{name}` | {'; '.join(cells)} |"


def page(lines: Sequence[str], others: Sequence[str], version: str) -> str:
    """The document."""
    heads = ["graph", "made by", "of", "located", "merged", "elsewhere", "slots", "folded"]
    return "\n".join(
        [
            HEAD,
            f"surgery {version}, {len(lines)} graphs.\n",
            f"| {' | '.join(heads)} |",
            f"| {' | '.join(['---'] * len(heads))} |",
            *lines,
            "",
            "## Other adapters, merged",
            "",
            OTHERS,
            "| graph | weights located, difference from PEFT |",
            "| --- | --- |",
            *others,
            "",
            SEEN,
        ]
    )
