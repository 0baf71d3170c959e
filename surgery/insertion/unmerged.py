# SPDX-License-Identifier: Apache-2.0
"""A base and adapters that stay apart, in one folder, as transformers and PEFT load them.

transformers (5.23, ``maybe_load_adapters``) takes a folder with a config.json and an adapter_config.json for a model with
its adapter: ``from_pretrained`` loads both from there, whatever base the adapter names. PEFT (0.21, ``save_pretrained``)
has one adapter, ``default``, in the folder, and others in folders of their names in it: the layout written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.engine.adapter_output import put_adapter
from surgery.engine.card import CARD, model_name, name_of
from surgery.engine.conversion import Conversion, bound_source, plan_conversion
from surgery.engine.execute import Run, execute
from surgery.engine.ledger import Ledger
from surgery.engine.plan import Plan, SideFile
from surgery.engine.rebuild.rebuild_plan import plan_rebuilt
from surgery.engine.rebuild.rebuilt_card import rebuilt_card
from surgery.reports.output import DRY_RUN, PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.registry import format_named
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import fingerprint
from surgery_formats.models.rebuilt.rebuilt import rebuilt_of
from surgery_formats.text import listing, show

__all__ = ["AdapterApart", "UnmergedResult", "insert_unmerged"]

_DEFAULT = "default"
_OWN = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class AdapterApart:
    """An adapter in the folder of its base.

    Attributes:
        name: What PEFT calls it.
        folder: Where it lies in the output; empty for the output itself.
        source: Where it came from.
        format: It was read as.
        parameters: Numbers trained.
    """

    name: str
    folder: str
    source: Path
    format: str
    parameters: int

    def as_json(self) -> dict[str, Any]:
        """Plain values, without paths."""
        return {"name": self.name, "folder": self.folder, "format": self.format, "parameters": self.parameters}


@summarised
@dataclass(frozen=True)
class UnmergedResult:
    """A folder with a base and adapters.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor of the base.
        adapters: In their order; the first is loaded with the model.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    ledger: Ledger
    adapters: tuple[AdapterApart, ...]
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of the base's weight files."""
        return self.ledger.plan.nbytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "adapters": [adapter.as_json() for adapter in self.adapters],
            "warnings": list(self.warnings),
            "ledger": self.ledger.as_json(),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """Where each adapter lies, and how it is loaded."""
        where = self.output or output
        columns = Column("adapter", "name"), Column("in"), Column("from", "name"), Column("trained", "count")
        rows = tuple((one.name, one.folder or "the folder itself", one.source, one.parameters) for one in self.adapters)
        facts: list[tuple[Phrase, Phrase]] = [("base", Name(self.ledger.plan.roots[0], PATH))]
        if where is not None:
            facts.append(("to", (Name(where, PATH), ": ", Value(self.nbytes, "bytes"), " of weights, copied")))
        sections: list[Section] = [Facts(tuple(facts)), Table(columns, rows)]
        if self.output is None:
            sections.append(DRY_RUN)
        else:
            path = Name(self.output, PATH)
            sections.append(Note(('next: load it with its adapter: AutoModel...from_pretrained("', path, '")')))
            sections += [Note(_loading(one, path)) for one in self.adapters[1:]]
        return Summary("Unmerged", (*sections, *warning_notes(self.warnings)))


def _loading(adapter: AdapterApart, path: Name) -> Phrase:
    name = Name(adapter.name)
    return ('and: model.load_adapter("', path, "/", name, '", adapter_name="', name, '")')


@dataclass(frozen=True, slots=True)
class _Planned:
    """An adapter with its files: those of its folder, or what its PEFT writer makes."""

    apart: AdapterApart
    adapter: Adapter
    copied: tuple[SideFile, ...] = ()
    rendered: Conversion | None = None


def insert_unmerged(
    base: Checkpoint, adapters: Sequence[WeightedAdapter], output: Path | None, run: Run
) -> UnmergedResult:
    """Write a base with its adapters beside and inside it.

    Args:
        base: A plain model.
        adapters: The first one is loaded with the model, others by name.
        output: Folder to make; None plans only.
        run: How.

    Raises:
        FitError: an adapter with a weight, which no configuration of PEFT's says; one that does not fit the base or that
            PEFT does not hold; two of one name.
        OutputExistsError, ResourceError, ProofError: as `surgery.engine.execute.execute`.
    """
    if weighted := [one for one in adapters if one.weight != 1.0]:
        raise FitError(
            f"a weight of {weighted[0].weight:g} is nowhere in such a folder",
            file=weighted[0].adapter.path,
            hint="scale it with `surgery.combine`, or set it where the model is loaded",
        )
    planned = [_planned(base, one.adapter, number) for number, one in enumerate(adapters)]
    names = [one.apart.name for one in planned]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FitError(f"two adapters are called '{show(twice[0])}'", hint="rename a folder")
    plan = _plan(base, planned)
    warnings = (*plan.warnings, *(issue for one in planned for issue in one.adapter.known_issues()))
    if base.path.is_dir() and len(planned):
        warnings += ("servers that load every *.safetensors of a folder (vLLM, SGLang) need base and adapter apart",)
    result = UnmergedResult(None, Ledger(plan), tuple(one.apart for one in planned), warnings)
    if output is None:
        return result

    def last(folder: OutputFolder) -> None:
        for one in planned:
            if one.rendered is not None:
                within = f"{one.apart.folder}/" if one.apart.folder else ""
                put_adapter(one.rendered.rendering, folder, within)

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        weighted = [(one.adapter, one.weight) for one in adapters]
        title = f"{model_name(base)} with {', '.join(name_of(one.path) for one, _ in weighted)} beside it"
        tags = tuple(dict.fromkeys(one.kind_name.lower() for one, _ in weighted))
        text = rebuilt_card(base, title, ledger, adapters=weighted, relation="adapter", tags=tags, warnings=warnings)
        return {CARD: text}

    ledger = execute(plan, output, run, finish, last=last)
    return replace(result, output=output, ledger=ledger)


def _planned(base: Checkpoint, adapter: Adapter, number: int) -> _Planned:
    binding = bound_source(adapter, base)
    own = adapter.path.resolve().name
    name = _DEFAULT if number == 0 else own.partition(".")[0]
    folder = "" if number == 0 else name
    if number and (
        not name or not is_safe_name(f"{folder}/x") or any(one.startswith(f"{folder}/") for one, _ in base.side_files)
    ):
        raise FitError(f"its name '{show(name)}' cannot be that of a folder in the base's", file=adapter.path)
    apart = AdapterApart(name, folder, adapter.path, adapter.format, adapter.parameters)
    within = f"{folder}/" if folder else ""
    if adapter.format == "peft" and adapter.path.is_dir() and not adapter.made:
        files = [SideFile(f"{within}{one}", source=path) for one in _OWN if (path := adapter.path / one).is_file()]
        if folder:
            own_side = [(one, path) for one, path in adapter.files_beside.items() if "/" not in one]
            files += [SideFile(f"{within}{one}", source=path) for one, path in own_side]
        return _Planned(apart, adapter, tuple(files))
    return _Planned(apart, adapter, rendered=plan_conversion(adapter, format_named("peft"), base, binding))


def _plan(base: Checkpoint, planned: Sequence[_Planned]) -> Plan:
    """The base's plan, with files of adapters among the side files."""
    plan = plan_rebuilt(rebuilt_of(base))
    inserted = [
        {**one.apart.as_json(), "files": sorted({fingerprint(file) for file in one.adapter.files})} for one in planned
    ]
    facts = {**plan.facts, "unmerged": inserted}
    files = tuple({file.identity: file for one in planned for file in one.adapter.files}.values())
    return replace(
        plan,
        verb="insert",
        side_files=(*plan.side_files, *(file for one in planned for file in one.copied)),
        inputs=(*plan.inputs, *files),
        roots=(*plan.roots, *(one.adapter.path for one in planned)),
        id=hashlib.sha256(json.dumps([__version__, "unmerged", facts], sort_keys=True).encode()).hexdigest(),
        facts=facts,
        warnings=(*plan.warnings, *_left_out(planned)),
    )


def _left_out(planned: Sequence[_Planned]) -> Iterator[str]:
    """Files beside the first adapter, in whose place the base has its own."""
    if planned and (beside := sorted(planned[0].adapter.files_beside)):
        yield f"the base's files are kept, and not those beside the first adapter: {listing(beside)}"
    doras = [one.apart.name for one in planned if _has_dora(one.adapter)]
    if doras:
        yield f"transformers (5.23) loads a DoRA without its magnitudes; attach it with PEFT: {listing(doras)}"


def _has_dora(adapter: Adapter) -> bool:
    return any(contents_of(update).dora for chain in adapter.updates.values() for update in chain)
