# SPDX-License-Identifier: Apache-2.0
"""The result of beginning an adapter: what it trains, what that takes, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.insertion.memory import TrainingMemory
from surgery.reports.output import DRY_RUN, PATH, destination, nbytes_of, written, wrote
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Cell, Name, NameList, Phrase, Value

__all__ = ["FreshResult"]

_USES = {
    "base": "weights of the base",
    "adapter": "weights of the adapter",
    "projections": "projections, not trained",
    "gradients": "gradients",
    "moments": "two moments of AdamW",
}
_SIZES = {"prompt": "tokens", "prefix": "tokens", "bottleneck": "width", "oft": "blocks of"}
_COLUMNS = (Column("held in training", "text"), Column("type"), Column("numbers", "count"), Column("bytes", "bytes"))


@summarised
@dataclass(frozen=True)
class FreshResult:
    """What was begun.

    Attributes:
        output: The folder; None for a dry run.
        format: Its format.
        kind: ``lora``, ``dora`` ...
        init: How its factors begin.
        rank: Of its factors; of prompts, how many tokens.
        targets: The modules it is for, as its format matches them.
        modules: How many modules those are.
        trained: Numbers it trains.
        parameters: Numbers of the base.
        memory: Of training it.
        full: Of training all of the base.
        base_nbytes: Bytes of the base's weight files, of which a full fine-tune has as many.
        residual: The base without what the factors begin with; None where nothing was taken from it.
        errors: By module what the init states, in order: of ``loftq`` what rounding took from the weight and what is left
            of it with the adapter; of a residual what is lost in its types. All relative to the weight.
        convertible: Folder with the same factors for PEFT's ``path_initial_model_for_weight_conversion``.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    format: str
    kind: str
    init: str
    rank: int
    targets: tuple[str, ...]
    modules: int
    trained: int
    parameters: int
    memory: TrainingMemory
    full: TrainingMemory
    base_nbytes: int
    residual: Path | None = None
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    convertible: Path | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def share(self) -> float:
        """Trained numbers, of those of base and adapter together, as PEFT states it."""
        return self.trained / (self.parameters + self.trained)

    @property
    def nbytes(self) -> int:
        """Size of all files written beside the residual base; 0 for a dry run."""
        return nbytes_of(self.output)

    def as_json(self) -> dict[str, Any]:
        """Plain values: the output, the time, and what the manifest has."""
        beside = {"residual": None if self.residual is None else str(self.residual)}
        return {"type": "fresh", **written(self.output, self.seconds), **beside, **self.as_manifest()}

    def as_manifest(self) -> dict[str, Any]:
        """The record in the manifest: the same for the same inputs and options, without paths and times."""
        return {
            "verb": "insert",
            "format": self.format,
            "kind": self.kind,
            "init": self.init,
            "rank": self.rank,
            "targets": list(self.targets),
            "modules": self.modules,
            "trained": self.trained,
            "parameters": self.parameters,
            "memory": self.memory.as_json(),
            "full_memory": self.full.as_json(),
            "errors": {name: [float(f"{one:.6g}") for one in some] for name, some in self.errors.items()},
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """What trains and what that takes; the errors of every module if `verbose`.

        Args:
            verbose: Every module that has an error.
            output: Where a dry run would write.
        """
        facts: list[tuple[Phrase, Phrase]] = [
            ("begin", self._begun()),
            ("to", destination(self.output or output, self.format)),
            *self._training(),
        ]
        facts += [("off by", self._error())] if self.errors else []
        if self.residual is not None:
            facts.append(("residual base", Name(self.residual, PATH)))
        if self.output is not None:
            facts.append(("wrote", wrote(self.output, self.seconds)))
        rows = tuple((_USES[item.item], item.dtype, item.numbers, item.nbytes) for item in self.memory.items)
        sections: list[Section] = [Facts(tuple(facts)), Table(_COLUMNS, rows)]
        if verbose and self.errors:
            columns = Column("module", "name"), *(Column(label, "share", 3) for label in self._labels)
            sections.append(Table(columns, tuple(_errors(name, some) for name, some in self.errors.items())))
        if self.output is None:
            sections.append(DRY_RUN)
        else:
            sections.append(Note(("next: ", *self._training_call(self.output))))
        return Summary("Fresh adapter", (*sections, *warning_notes(self.warnings)))

    def figures(self) -> tuple[tuple[Phrase, Phrase], ...]:
        """What is trained and what that takes, for a model card."""
        return ("begun as", self._begun()), *self._training()

    def _training_call(self, output: Path) -> tuple[str | Name, ...]:
        """The call with which its library goes on training it; none of them finds the base by itself."""
        path = Name(output, PATH)
        if self.format == "mlx":
            weights, config = (Name(output / name, PATH) for name in ("adapters.safetensors", "adapter_config.json"))
            flags = " --model BASE --train --data DATA --resume-adapter-file "
            return "train it: mlx_lm.lora -c ", config, flags, weights
        if self.format == "adapterhub":
            return 'train it with adapters: model.train_adapter(model.load_adapter("', path, '", use_safetensors=True))'
        if self.kind in ("prompt", "prefix"):  # PEFT trains none that it loads as a whole
            made = "get_peft_model(model, config with inference_mode=False)"
            return f'train it: set_peft_model_state_dict({made}, load_peft_weights("', path, '"))'
        base: tuple[str | Name, ...] = ("its base",) if self.residual is None else (Name(self.residual, PATH),)
        call = "train it on ", *base, ': PeftModel.from_pretrained(model, "', path, '", is_trainable=True)'
        if self.convertible is None:
            return call
        into = ', then save it with path_initial_model_for_weight_conversion="'
        return *call, into, Name(self.convertible, PATH), '" for a LoRA'

    def _begun(self) -> str:
        size = f"{_SIZES.get(self.kind, 'rank')} {self.rank}, " if self.kind != "ia3" else ""
        return f"{self.kind}, {size}init {self.init}"

    def _training(self) -> Iterator[tuple[Phrase, Phrase]]:
        if self.targets:
            yield "targets", (f"{self.modules} modules: ", NameList(self.targets))
        times = self.full.nbytes / max(self.memory.nbytes, 1)
        yield "trains", (Value(self.trained, "count"), " numbers, ", Value(self.share, "share", 3), " of all")
        yield "memory", (Value(self.memory.nbytes, "bytes"), " to train it, activations not counted")
        yield "all weights", (Value(self.full.nbytes, "bytes"), ": ", Value(times, "number", 3), " times as much")
        yield "saves", (Value(self.full.nbytes - self.memory.nbytes, "bytes"), " in training; ", *self._copies())

    def _copies(self) -> tuple[Any, ...]:
        size = 4 * self.trained
        return Value(self.base_nbytes - size, "bytes"), " on disk for each task"

    @property
    def _labels(self) -> tuple[str, ...]:
        return ("rounding took", "left with the adapter") if self.init == "loftq" else ("lost in the residual",)

    def _error(self) -> Phrase:
        greatest = tuple(max(some[at] for some in self.errors.values()) for at in range(len(self._labels)))
        if self.init == "loftq":
            before, after = greatest
            return (
                "rounding took ",
                Value(before, "share", 3),
                " of a weight at most; ",
                Value(after, "share", 3),
                " is left",
            )
        return Value(greatest[0], "number"), " of a weight at most: what the types of the residual round"


def _errors(name: str, some: tuple[float, ...]) -> tuple[Cell, ...]:
    return (name, *some)
