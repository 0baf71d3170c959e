# SPDX-License-Identifier: Apache-2.0
"""The model card of exported graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from surgery.engine.card import adapter_table, card, measured_table, model_name
from surgery.engine.card_figures import base_row, measured_of
from surgery.engine.card_metadata import Relation, base_of_card, card_metadata
from surgery.engine.ledger import CodeError, Ledger
from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.graph.contract import Contract
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import count, markdown, markdown_code, show

__all__ = ["code_figures", "export_card"]

_LIBRARIES = {"transformers.js": "transformers.js", "sentence-transformers": "sentence-transformers"}
"""What loads a layout, as the hub calls it."""


def export_card(
    base: Checkpoint,
    roles: AdapterRoles,
    contract: Contract,
    ledger: Ledger | None,
    layout: str,
    value_range: str,
    warnings: Iterable[str],
) -> bytes:
    """README.md of graphs.

    Args:
        base: What they were made of.
        roles: The adapters in them and beside them.
        contract: Of the first graph.
        ledger: Of the weights that were computed.
        layout: Of the files.
        value_range: How large values get, where that was measured.
        warnings: What the user should know.
    """
    weighted = [(named.adapter, named.weight) for named in roles.named]
    relation = _relation(contract)
    head = card_metadata(
        base.path,
        hub_name(base, [adapter.base_name for adapter, _ in weighted]),
        relation=relation,
        library=_LIBRARIES.get(layout, "onnx"),
        behind=base_of_card(base.path),
        task=contract.task,
        tags=("onnx", *((relation,) if relation == "merge" else ())),
    )
    tables = [adapter_table(weighted)] if weighted else []
    rows = [base_row(base), *_figures(contract)]
    rows += [] if ledger is None else _measured(contract, ledger)
    rows += [("range of the values", markdown(value_range))] if value_range else []
    notes = [
        f"The adapter {markdown_code(show(entry['name'], 60))} is {_MODES.get(entry['mode'], entry['mode'])}."
        for entry in contract.adapters
    ]
    return card(head, f"{model_name(base)} as ONNX", *tables, measured_table(rows), notes=notes, warnings=warnings)


_MODES: Mapping[str, str] = {
    "merged": "merged into the weights",
    "swapped": "beside the graph, which computes the base until a program gives it",
    "inserted": "a part of the graph",
    "prefixed": "in front of every text",
}


def _relation(contract: Contract) -> Relation:
    """Of codes ``quantized``; with adapters in the graph itself ``merge``; a graph of the base as it is has no word there."""
    if contract.quantised:
        return "quantized"
    return "merge" if any(entry["mode"] != "swapped" for entry in contract.adapters) else ""


def _figures(contract: Contract) -> Iterator[tuple[str, str]]:
    yield "graph", f"for {contract.target}, arithmetic in {contract.dtype}"
    if contract.kind == "decoder":
        yield "longest sequence", f"{contract.max_length:,} tokens"
    if contract.slots:
        yield "slots for adapters", count(len(contract.slots))


def _measured(contract: Contract, ledger: Ledger) -> Iterator[tuple[str, str]]:
    yield from measured_of(ledger)
    if (codes := code_figures(contract, ledger)) is not None:
        counted, error, worst, name = codes
        yield "codes", counted
        yield "error of the values of codes, of their norm", f"{error:.4f}, at most {worst:.4f} ({markdown_code(name)})"


def code_figures(contract: Contract, ledger: Ledger) -> tuple[str, float, float, str] | None:
    """How many weights became codes of which type, their relative error, the worst one and its weight; None without codes."""
    if not (coded := ledger.coded):
        return None
    kinds = Counter[str]()
    for entry in contract.quantised:
        kinds["fp8" if "type" in entry else f"int{entry['bits']}"] += len(entry["weights"])
    counted = ", ".join(f"{number} in {kind}" for kind, number in sorted(kinds.items()))
    total = sum((error for _, error in coded), CodeError(0.0, 0.0, 0.0))
    tensor, worst = max(coded, key=lambda pair: pair[1].relative)
    return counted, total.relative, worst.relative, show(tensor.label.removesuffix(".codes"), 100)
