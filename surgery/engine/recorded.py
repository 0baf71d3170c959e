# SPDX-License-Identifier: Apache-2.0
"""The recipe in a manifest: the verb with its arguments, and inputs by their content, so that it can be applied again.

Where inputs lie and what their folders are called is not told: a manifest is the same for copies of the same inputs.

What changes no byte (threads, limits, places) is left out, and so is every argument that has its default.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.rank import Rank
from surgery.reports.request import current_request
from surgery_formats.errors import NotFoundError, SurgeryError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.places import entries, is_file, is_folder
from surgery_formats.files.raw import File, open_file
from surgery_formats.files.remote.path import to_path
from surgery_formats.models.identity import fingerprint
from surgery_formats.refs import resolve

__all__ = [
    "NOT_RECORDED",
    "InputNames",
    "input_digest",
    "rank_fields",
    "recorded_recipe",
    "takes_references",
    "versions_of",
    "with_file",
]

NOT_RECORDED = frozenset(
    {
        *("output", "adapter_output", "workers", "memory_limit", "verify_copies", "overwrite", "dry_run", "progress"),
        *("engine", "merge_rest", "fix", "residual"),
    }
)
_SECOND_OUTPUTS = frozenset({"residual"})
"""Places of a second output that decides what the first one holds: a recipe has none, so that such a request has no recipe."""
_REFERENCES = ("CheckpointLike", "AdapterLike", "AdaptersLike", "Openable", "StrPath")
_MOST = 10_000  # files of an input


def takes_references(annotation: str) -> bool:
    """Whether an argument with this annotation names inputs."""
    return any(word in annotation for word in _REFERENCES)


def recorded_recipe() -> dict[str, Any]:
    """``{"recipe": ...}`` of the current request; empty where there is none."""
    request = current_request()
    if request is None:
        return {}
    if request.recipe is not None:
        return {"recipe": dict(request.recipe)}
    signature = inspect.signature(request.verb)
    given = signature.bind(*request.args, **(request.kwargs or {})).arguments
    if any(given.get(name) is not None for name in _SECOND_OUTPUTS):
        return {}
    names = InputNames()
    step: dict[str, Any] = {"verb": request.verb.__name__.replace("_", "-")}
    for name, value in given.items():
        parameter = signature.parameters[name]
        if name in NOT_RECORDED or value is parameter.default or _is_nothing(value):
            continue
        annotation = str(parameter.annotation)
        if name == "vocab":
            step[name] = with_file(value, partial(names.name_of, name))
        elif takes_references(annotation) or isinstance(value, os.PathLike):
            step[name] = names.recorded(name, value)
        elif isinstance(value, Rank):
            step |= rank_fields(value)
        elif type(value) is type(parameter.default) and value == parameter.default:
            continue
        else:
            step[name] = _plain(value)
    return {"recipe": {"inputs": names.inputs, "steps": [step], "version": __version__}}


def with_file(vocab: str, named: Callable[[str], str]) -> str:
    """``trim=FILE`` with something else for the file; other texts as they are."""
    way, sign, file = vocab.partition("=")
    return f"{way}={named(file)}" if way == "trim" and sign else vocab


def _plain(value: Any) -> Any:
    """The value as JSON has it: numpy's numbers are Python's."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if not isinstance(value, Real):
        return type(value).__name__  # an object: it is made by a program, and by no recipe
    return int(value) if isinstance(value, Integral) else float(value)


def _is_nothing(value: object) -> bool:
    return isinstance(value, tuple | list | dict) and not value


def rank_fields(rank: Rank) -> dict[str, Any]:
    """A choice of ranks under the names of its options."""
    size = rank.most_size
    fields: dict[str, Any] = {
        "rank": "auto" if rank.above_noise else rank.number,
        "rank_pattern": dict(rank.patterns) or None,
        "energy": rank.least_energy,
        "max_error": rank.most_error,
        "budget": None if size is None else f"{size.limit}{'B' if size.measure == 'bytes' else ''}",
    }
    return {name: value for name, value in fields.items() if value is not None}


class InputNames:
    """Gives inputs names, and says what they were."""

    def __init__(self) -> None:
        self.inputs: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}

    def recorded(self, argument: str, value: Any) -> Any:
        """An argument that names inputs, by their names; weights stay."""
        if isinstance(value, Mapping):
            return [self._weighted(argument, key, weight) for key, weight in value.items()]
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real):
            return [self._weighted(argument, *value)]
        if hasattr(value, "adapter") and hasattr(value, "weight"):
            return [self._weighted(argument, value.adapter, value.weight)]
        if isinstance(value, Iterable) and not isinstance(value, str | os.PathLike):
            return [one for item in value for one in _listed(self.recorded(argument, item))]
        return self.name_of(argument, value)

    def _weighted(self, argument: str, value: Any, weight: float) -> Any:
        inner = self.recorded(argument, value)
        if isinstance(inner, list):
            ((inner, before),) = inner[0].items() if isinstance(inner[0], dict) else ((inner[0], 1.0),)
            weight *= before
        return inner if weight == 1 else {inner: _plain(weight)}

    def name_of(self, argument: str, value: Any) -> str:
        """The name of one input. What is no path is a name itself: `fold` takes adapters that are inside a graph by theirs."""
        try:
            path = to_path(getattr(value, "path", value) if not isinstance(value, str) else resolve(value))
        except NotFoundError:  # the verb has opened all that it opens
            return str(value)
        key = str(path.resolve())
        if key not in self._names:
            count = sum(name.rstrip("0123456789") == argument for name in self.inputs)
            name = f"{argument}{count + 1}" if count else argument
            self._names[key] = name
            components = getattr(value, "components", {}).values() if not isinstance(value, str) else ()
            made = [c.made for c in components if c.made] or ([value.made] if getattr(value, "made", "") else [])
            self.inputs[name] = {"files": input_digest(path)}
            if made:
                self.inputs[name]["made"] = made[0]
        return self._names[key]


def versions_of(inputs: Iterable[File]) -> dict[str, Any]:
    """``{"objects": ...}``: the etags, and versions, of inputs that lie in buckets, by name; empty without any."""
    found = sorted(
        ((file.path.name, file.remote.record) for file in inputs if file.remote is not None),
        key=lambda pair: (pair[0], sorted(pair[1].items())),
    )
    return {"objects": [{"name": name, **record} for name, record in found]} if found else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def input_digest(path: Path) -> str:
    """What lies at a path: a fingerprint of its files, as far as models and adapters have some.

    Hidden files, folders in folders, model cards and manifests do not count.
    """
    import xxhash

    if not path.is_dir():
        return fingerprint(open_file(path))
    names: list[str] = []
    for entry in entries(path):
        if is_folder(entry) and not entry.name.startswith("."):
            names += [f"{entry.name}/{inner.name}" for inner in entries(entry) if is_file(inner)]
        elif is_file(entry):
            names.append(entry.name)
    state = xxhash.xxh3_128()
    for name in sorted(names)[:_MOST]:
        last = name.rpartition("/")[2]
        if last.startswith(".") or last in (MANIFEST, "README.md"):
            continue
        try:
            seen = fingerprint(open_file(path / name))
        except SurgeryError:  # a pipe, or a file that may not be read: no part of a model that was
            continue
        state.update(f"{name}\0{seen}\n".encode(errors="surrogatepass"))
    return state.hexdigest()
