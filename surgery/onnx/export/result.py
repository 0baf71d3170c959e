# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.export_onnx`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.ledger import Ledger
from surgery.onnx.export.place import Mode
from surgery.onnx.graph.contract import Contract
from surgery.reports.result import elapsed, summarised
from surgery_formats.files.remote.path import is_remote
from surgery_formats.models.families.tasks import IMAGE_TASKS

# An export takes a quarter of a second, most of it imports: those of a summary wait until one is made.
if TYPE_CHECKING:
    from surgery.reports.summary import Summary
    from surgery.reports.values import Phrase, Piece

__all__ = ["ExportResult"]

_WEIGHTS = {
    "reference": "used where they lie",
    "link": "hard links",
    "copy": "copied",
    "embed": "inside the graph",
}
_PAIRED = ("question-answering", "multiple-choice")


@summarised
@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        output: The folder.
        contract: The contract of ``model.onnx``.
        files: Written graphs and small files with their sizes.
        weights: How the weights were placed.
        nbytes: Bytes written.
        nodes: Number of nodes of ``model.onnx``.
        warnings: Warnings for the user.
        ledger: The ledger of merged weights, or None.
        value_range: How large values get that the graph stores, where that was measured, or empty.
        seconds: Duration of the export.
    """

    output: Path
    contract: Contract
    files: Mapping[str, int]
    weights: Mode
    nbytes: int
    nodes: int
    warnings: tuple[str, ...]
    ledger: Ledger | None = None
    value_range: str = ""
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        contract = self.contract
        return {
            "output": str(self.output),
            "task": contract.task,
            "target": contract.target,
            "dtype": contract.dtype,
            "padding": contract.padding,
            "cache": contract.cache,
            "max_length": contract.max_length,
            "files": dict(self.files),
            "weights": self.weights,
            "weight_files": [file.name for file in contract.weights],
            "adapters": [dict(adapter) for adapter in contract.adapters],
            "virtual_tokens": contract.virtual_tokens,
            "vocabulary_rows": contract.vocabulary_rows,
            "slots": [slot.weight for slot in contract.slots],
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "nodes": self.nodes,
            **({"range": self.value_range} if self.value_range else {}),
            "warnings": list(self.warnings),
            "ledger": self.ledger.as_json() if self.ledger else None,
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """The graph, where adapters and weights went, and how to run it; always all of it."""
        from surgery.reports.sections import Facts
        from surgery.reports.summary import Summary, warning_notes
        from surgery.reports.values import Value

        contract = self.contract
        graphs = ", ".join(name for name in self.files if "/" not in name or name.endswith(".onnx"))
        facts: list[tuple[str, Phrase]] = [
            ("graph", f"{self.nodes} nodes for {contract.target} in {contract.dtype}: {graphs}")
        ]
        if contract.kind == "decoder":
            side = {"any": "left or right"}.get(contract.padding, contract.padding)
            padded = f" tokens; rows of a batch are padded on the {side}"
            facts.append(("context", ("up to ", Value(contract.max_length, "count"), padded)))
        facts += map(_adapter, contract.adapters)
        if self.value_range:
            facts.append(("range", self.value_range))
        if self.ledger is not None:
            changed, written = Value(len(self.ledger.plan.computed()), "count"), Value(self.ledger.plan.nbytes, "bytes")
            facts.append(("changed", (changed, " tensors, ", written, " written for them")))
            facts += _codes(contract, self.ledger)
        computed = {Path(file.name).name for file in self.ledger.plan.files} if self.ledger is not None else set[str]()
        placed = ((file.name, file.name in computed and self.weights != "embed") for file in contract.weights)
        weights = ", ".join(f"{name}: {'written' if own else _WEIGHTS[self.weights]}" for name, own in placed)
        took: tuple[Piece, ...] = (" in ", Value(self.seconds, "seconds")) if self.seconds else ()
        facts += [
            ("weights", weights),
            ("written", (Value(self.nbytes, "bytes"), *took)),
        ]
        if not contract.embedder and not is_remote(self.output):  # onnxruntime reads files
            facts.append(("next", tuple(self._command())))
        return Summary("Export", (Facts(tuple(facts)), *warning_notes(self.warnings)))

    def _command(self) -> Iterator[Piece]:
        yield "surgery run "
        yield _quoted(self.output)
        tokenizer = (self.output / "tokenizer.json").exists()
        if self.contract.task == "automatic-speech-recognition":
            yield " --audio talk.wav"
        elif self.contract.task in IMAGE_TASKS:
            yield " --images image.npy"
        elif self.contract.task in _PAIRED and tokenizer:
            yield ' --pair "..." "..."'
        else:
            yield ' -p "..."' if tokenizer else " --ids 1,2,3"
        for adapter in self.contract.adapters:
            if adapter["mode"] == "swapped":
                yield " --adapter "
                yield _quoted(self.output / adapter["file"])
                return


def _codes(contract: Contract, ledger: Ledger) -> Iterator[tuple[str, Phrase]]:
    """How many weights became codes of how many bits, and what that lost."""
    from surgery.onnx.export.export_card import code_figures

    if (figures := code_figures(contract, ledger)) is not None:
        counted, error, worst, name = figures
        yield "codes", f"{counted}: error {error:.4f} of the values, at most {worst:.4f} ({name})"


def _adapter(adapter: Mapping[str, Any]) -> tuple[str, Phrase]:
    from surgery.reports.values import Name

    name, kind = Name(adapter["name"], 60), f" ({adapter['kind']})"
    if adapter["mode"] == "merged":
        return "merged", (name, kind + (f", weight {adapter['weight']:g}" if adapter["weight"] != 1 else ""))
    if adapter["mode"] == "inserted":
        return "inserted", (name, f"{kind}: {adapter['file']}")
    if adapter["mode"] == "swapped":
        return "swap", (name, f"{kind}: {adapter['file']}")
    where = f": {adapter['file']}" if "file" in adapter else ""
    if "rows" in adapter:
        first, rows = adapter["rows"]
        where = f": ids {first} to {first + rows - 1}"
    return "in front", (name, f"{kind}, {adapter['virtual_tokens']} tokens{where}")


def _quoted(path: Path) -> Piece:
    """A path quoted for a shell."""
    from surgery.reports.output import PATH
    from surgery.reports.values import Name

    return Name(shlex.quote(str(path)), PATH)
