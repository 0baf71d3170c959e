# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, in every way it writes, as small runs of `crash_commands`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        name: What it covers.
        words: After ``surgery``. Inputs lie in ``in``, and what is written in ``work``.
        outputs: What is written into ``work``; more than one where a command has several outputs.
        makes: Commands that make further inputs, in ``made``; equal ones run once. ``quantise FORMAT`` is the base in it.
        brings: Folders that are copied into ``work`` first, with their names there.
        adds: Whether files are added to an output that is there: each is complete or absent.
        recipe: Text of ``work``'s neighbour ``recipe.yaml``.
    """

    name: str
    words: str
    outputs: tuple[str, ...] = ("out",)
    makes: tuple[str, ...] = ()
    brings: tuple[tuple[str, str], ...] = ()
    adds: bool = False
    recipe: str = ""


_GRAPH = "export-onnx in/base -o made/graph"
_TUNED_GRAPH = "export-onnx in/tuned -o made/tuned-graph"
_MERGED = "merge in/base in/lora -o made/merged --reversible"
_PREFIX = "prompt convert in/prompt --to prefix --base in/base -o made/prefix"
_SLOTS = "export-onnx in/base --swap in/lora -o made/slots"
_RECIPE = """\
steps:
  - {verb: convert, adapter: in/lora, to: mlx, as: small}
  - {verb: merge, base: in/base, adapters: small, output: work/out}
"""
_TWO = """\
steps:
  - {verb: resize, adapter: in/lora, rank: 1, as: small, output: work/small}
  - {verb: merge, base: in/base, adapters: small, output: work/out}
"""

CASES = (
    # --- models ---
    Case("merge", "merge in/base in/lora -o work/out --workers 1"),
    Case("merge-shards", "merge in/base in/lora -o work/out --shard-size 40KB --workers 1"),
    Case("merge-packed", "merge in/base in/lora -o work/out --layout packed --workers 1"),
    Case("merge-reversible", "merge in/base in/lora -o work/out --reversible --workers 1"),
    Case(
        "merge-overwrite",
        "merge in/base in/lora -o work/out --overwrite --workers 1",
        brings=(("made/old", "out"),),
        makes=("merge in/base in/other -o made/old",),
    ),
    Case("merge-graph", "merge made/graph/model.onnx in/lora --base in/base -o work/out --workers 1", makes=(_GRAPH,)),
    Case("merge-gguf", "merge golden/base.gguf golden/lora/peft -o work/out --workers 1"),
    Case(
        "merge-codes", "merge made/mlx in/lora -o work/out --quantized requantize --workers 1", makes=("quantise mlx",)
    ),
    Case(
        "merge-residual",
        "merge made/mlx in/lora -o work/out --quantized residual --rank 2 --workers 1",
        makes=("quantise mlx",),
    ),
    Case("unmerge", "unmerge made/merged in/lora -o work/out --workers 1", makes=(_MERGED,)),
    Case("unmerge-lora", "unmerge in/base made/merged -o work/out --workers 1", makes=(_MERGED,)),
    Case("layers", "layers in/base -o work/out --keep 0 --workers 1"),
    Case(
        "layers-and-adapter",
        "layers in/base -o work/out --keep 0 --adapter in/lora --adapter-output work/moved --workers 1",
        outputs=("out", "moved"),
    ),
    # --- adapters ---
    Case("extract", "extract-lora in/base in/tuned --rank 2 -o work/out --workers 1"),
    Case(
        "extract-file",
        "extract-lora in/base in/tuned --rank 2 --to loralib --dense none --allow-loss -o work/out.pt --workers 1",
        outputs=("out.pt",),
    ),
    Case("extract-codes", "extract-lora in/base in/tuned --rank 2 --factors int4 -o work/out --workers 1"),
    Case(
        "extract-graphs",
        "extract-lora made/graph/model.onnx made/tuned-graph/model.onnx --base in/base --rank 2 -o work/out --workers 1",
        makes=(_GRAPH, _TUNED_GRAPH),
    ),
    Case("combine", "combine in/lora=0.5 in/other -o work/out"),
    Case(
        "combine-overwrite",
        "combine in/lora=0.5 in/other -o work/out --overwrite",
        brings=(("made/old-lora", "out"),),
        makes=("combine in/lora=0.5 -o made/old-lora",),
    ),
    Case("resize", "resize in/lora --rank 1 -o work/out"),
    *(
        Case(f"convert-{name}", f"convert in/lora --to {name} --base in/base -o work/{out}", outputs=(out,))
        for name, out in (
            ("compact", "out"),
            ("mlx", "out"),
            ("bare", "out.safetensors"),
            ("gguf", "out.gguf"),
            ("keras", "out"),
            ("litgpt", "out"),
            ("loralib", "out.pt"),
            ("tensorrt-llm", "out"),
            ("torchtune", "out"),
            ("adapterhub", "out"),
        )
    ),
    Case(
        "convert-overwrite-file",
        "convert in/lora --to gguf --base in/base -o work/out.gguf --overwrite",
        outputs=("out.gguf",),
        brings=(("made/old.gguf", "out.gguf"),),
        makes=("convert in/other --to gguf --base in/base -o made/old.gguf",),
    ),
    Case(
        "convert-onnx-adapter",
        "convert in/lora --to onnx-adapter --graph made/slots/model.onnx -o work/out.onnx_adapter",
        outputs=("out.onnx_adapter",),
        makes=(_SLOTS,),
    ),
    Case("convert-graph", "convert made/graph/model.onnx --to safetensors --base in/base -o work/out", makes=(_GRAPH,)),
    # --- insert ---
    Case(
        "insert",
        "insert in/base made/norms -o work/out --workers 1",
        makes=("extract-lora in/base in/tuned --matrices full -o made/norms",),
    ),
    Case("insert-unmerged", "insert in/base in/lora in/other --unmerged -o work/out --workers 1"),
    Case("insert-new", "insert in/base --new lora --rank 2 -o work/out --workers 1"),
    Case(
        "insert-new-residual",
        "insert in/base --new lora --rank 2 --init pissa --residual work/rest -o work/out --workers 1",
        outputs=("out", "rest"),
    ),
    Case(
        "insert-slots",
        "insert made/graph/model.onnx in/lora in/other --base in/base -o work/out --workers 1",
        makes=(_GRAPH,),
    ),
    Case(
        "insert-gated",
        "insert made/graph/model.onnx in/lora --base in/base --gated -o work/out --workers 1",
        makes=(_GRAPH,),
    ),
    # --- export-onnx ---
    Case("export", "export-onnx in/base in/lora -o work/out"),
    Case("export-beside", "export-onnx work/out in/lora -o work/out", brings=(("in/base", "out"),), adds=True),
    Case(
        "export-beside-swap", "export-onnx work/out --swap in/lora -o work/out", brings=(("in/base", "out"),), adds=True
    ),
    Case("export-swap", "export-onnx in/base --swap in/lora --swap in/other -o work/out"),
    Case(
        "export-overwrite",
        "export-onnx in/base --swap in/lora -o work/out --overwrite",
        brings=(("made/graph", "out"),),
        makes=(_GRAPH,),
    ),
    Case("export-full", "export-onnx in/base in/lora --merge-to full -o work/out"),
    Case("export-link", "export-onnx in/base in/lora --weights link -o work/out"),
    Case("export-embed", "export-onnx in/base in/lora --weights embed -o work/out"),
    Case("export-int4", "export-onnx in/base in/lora --weights-type int4 -o work/out"),
    Case("export-int8", "export-onnx in/base --weights-type int8 --embeddings int8 -o work/out"),
    Case("export-mixed", "export-onnx in/base --weights-type mixed --budget 40KB -o work/out"),
    Case("export-int4-swap", "export-onnx in/base --weights-type int4 --swap in/lora -o work/out"),
    Case("export-prefix", "export-onnx in/base --prefix made/prefix -o work/out", makes=(_PREFIX,)),
    Case("export-rows", "export-onnx in/base --prefix in/prompt --prompt-form rows -o work/out"),
    Case("export-embeds", "export-onnx in/base --inputs-embeds -o work/out"),
    *(
        Case(f"export-{layout}", f"export-onnx in/base --layout {layout} -o work/out")
        for layout in ("transformers.js", "optimum", "genai", "triton")
    ),
    # --- graphs ---
    Case("fold", "fold made/slots/model.onnx made/slots/adapters/lora.onnx_adapter -o work/out", makes=(_SLOTS,)),
    Case("strip", "strip in/traced -o work/out"),
    # --- prompts ---
    Case("prompt-bake", "prompt bake in/prompt in/base -o work/out --workers 1"),
    Case("prompt-bake-kv", "prompt bake in/prompt in/base --as kv -o work/out --workers 1"),
    Case("prompt-combine", "prompt combine in/prompt in/prompt -o work/out"),
    Case("prompt-convert", "prompt convert in/prompt --to prefix --base in/base -o work/out"),
    Case("prompt-transfer", "prompt transfer in/prompt in/base --onto in/tuned -o work/out --accept-loss"),
    # --- others ---
    Case("report", "report in/lora --base in/base --md work/out.md", outputs=("out.md",)),
    Case(
        "report-overwrite",
        "report in/lora --base in/base --md work/out.md --overwrite",
        outputs=("out.md",),
        brings=(("in/base/config.json", "out.md"),),
    ),
    Case("apply", "apply recipe.yaml", recipe=_RECIPE),
    Case("apply-two", "apply recipe.yaml", recipe=_TWO, outputs=("small", "out")),
    Case(
        "apply-manifest",
        "apply made/merged/surgery_manifest.json --input base=in/base --input adapters=in/lora -o work/out",
        makes=(_MERGED,),
    ),
    Case("check-fix", "check in/base in/lora --for vllm --fix work/out"),
    Case(
        "convert-rest",
        "convert made/with-head --for vllm --base in/base --merge-rest work/rest -o work/out",
        outputs=("rest", "out"),
        makes=("extract-lora in/base in/tuned --rank 2 --embeddings full -o made/with-head",),
    ),
)
