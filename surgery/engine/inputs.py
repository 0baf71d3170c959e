# SPDX-License-Identifier: Apache-2.0
"""Arguments of verbs: a path, a name on the hub or an opened object; one adapter or several, with weights.

A ``str`` is a reference as the command takes it: a local path wins, and ``org/name`` or ``hf://org/name`` is fetched
from the hub where nothing local has that name (`surgery_formats.refs`). A ``pathlib.Path`` is always local. What knows
adapters is imported when there are some: it costs a plain export as much as all the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from surgery.arguments import check_types, wrong_type
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.containers.onnx.graph import external_locations
from surgery_formats.containers.sharded import MODEL_STEMS, is_index
from surgery_formats.containers.weight_files import holds_weights, is_weight_file
from surgery_formats.errors import FitError, NotFoundError, UsageError
from surgery_formats.files.places import is_file, names_in
from surgery_formats.files.remote.path import to_path
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.refs import resolve
from surgery_formats.text import show
from surgery_formats.threads import LARGEST_COUNT, MOST_THREADS

if TYPE_CHECKING:
    from surgery_formats.canonical.adapter import Adapter, WeightedAdapter

__all__ = [
    "AdapterLike",
    "AdaptersLike",
    "CheckpointLike",
    "Openable",
    "StrPath",
    "WeightedLike",
    "as_adapter",
    "as_checkpoint",
    "as_list",
    "as_opened",
    "as_path",
    "as_weighted",
    "check_alpha",
    "check_counts",
    "local_path",
    "open",
    "opened_or_graph",
    "output_path",
]

_LEAST_ALPHA, _MOST_ALPHA = 1e-12, 1e12  # factors are divided by its root: beyond, they leave the range of their type

StrPath = str | os.PathLike[str]
CheckpointLike = StrPath | Checkpoint
Openable: TypeAlias = "StrPath | Checkpoint | Adapter"
AdapterLike: TypeAlias = "StrPath | Adapter"
WeightedLike: TypeAlias = "AdapterLike | WeightedAdapter | tuple[AdapterLike, float]"
AdaptersLike: TypeAlias = "WeightedLike | Iterable[WeightedLike] | Mapping[Any, float]"

Item = TypeVar("Item")

_GRAPH = "model.onnx"
_AN_ADAPTER = "an adapter where a full model was expected"
_ITS_BASE = "its base belongs here"


def open(reference: StrPath, *, alpha: float | None = None) -> Checkpoint | Adapter:
    """Open a model or an adapter, whichever lies there; only headers are read.

    Args:
        reference: File, folder or name on the hub. A folder that is both (a training run's) is an adapter.
        alpha: What an adapter was trained with whose file does not state it (PEFT's weights alone, torchtune,
            litgpt, loralib, NeMo, older MLX).

    Raises:
        UsageError: an alpha, and a model.
        NotFoundError: nothing there, or no weights in the folder.
        MalformedError: a header or a configuration is not what its format says.
        FitError: an adapter of a kind that is not read.
    """
    from surgery_formats.adapters.registry import format_at, is_adapter_file, refuse_unread, told_alpha

    path = as_path(reference, "reference")
    if not path.exists():
        raise NotFoundError("no such file or folder", file=path)
    # A merged model may have kept adapter_config.json.
    only_a_model = _model_files(path) and not any(is_adapter_file(name) for name in _weight_files(path))
    adapter_format = None if only_a_model else format_at(path)
    if adapter_format is not None:
        return (adapter_format if alpha is None else told_alpha(adapter_format, path, alpha)).read(path)
    if not only_a_model:
        refuse_unread(path, networks=False)
    if alpha is not None:
        raise UsageError("an alpha belongs to an adapter, and this is a model")
    return open_checkpoint(path)


def as_opened(value: Openable, argument: str) -> Checkpoint | Adapter:
    """The model or adapter that `value` is or names.

    Raises:
        UsageError: neither.
        InputError, FitError: see `open`.
    """
    if isinstance(value, str | os.PathLike):
        return open(value)
    if isinstance(value, Checkpoint) or (_is_adapter(value) and hasattr(value, "updates")):
        return value
    raise wrong_type(value, argument, "a path, a Checkpoint or an Adapter")


def opened_or_graph(value: Openable, argument: str) -> Checkpoint | Adapter | Path:
    """As `as_opened`; of an ONNX graph the path of its file, whatever is in it.

    Raises:
        UsageError: neither a reference nor what was opened.
        InputError, FitError: see `open`.
    """
    if isinstance(value, str | os.PathLike):
        value = as_path(value, argument)
        if value.name.endswith(ONNX.suffixes) and value.is_file():
            return value
        if value.is_dir() and (graph := _graph_of_weights(value)) is not None:
            return graph
    opened = as_opened(value, argument)
    if isinstance(opened, Checkpoint) and opened.is_graph and not opened.is_pipeline:
        return opened.main.shards[0].path
    return opened


def _graph_of_weights(folder: Path) -> Path | None:
    """The graph that uses all of several files of weights, none of which is a model by its name: an export with an adapter."""
    names = _weight_files(folder)
    graphs = [name for name in names if name.endswith(ONNX.suffixes)]
    weights = set(names) - set(graphs)
    if len(weights) < 2 or _model_files(folder):
        return None
    name = _GRAPH if _GRAPH in graphs else graphs[0] if len(graphs) == 1 else None
    return folder / name if name and weights <= set(external_locations(folder / name)) else None


def _weight_files(folder: Path) -> list[str]:
    """Names of the files of weights in a folder, of any program, and of their indices; none for a file."""
    names = [name for name in names_in(folder) if is_file(folder / name)] if folder.is_dir() else []
    return [name for name in names if holds_weights(name) or is_index(name)]


def _model_files(folder: Path) -> list[str]:
    """Those of them that are a full model's, and can be read."""
    return [
        name
        for name in _weight_files(folder)
        if name.startswith(MODEL_STEMS) and (is_weight_file(name) or is_index(name))
    ]


def as_path(value: StrPath, argument: str) -> Path:
    """The local path of a reference.

    Raises:
        UsageError: not a reference.
        NotFoundError, InputError: a name that is neither here nor on the hub.
    """
    if isinstance(value, str):
        return resolve(value)
    return local_path(value, argument)


def as_checkpoint(
    value: CheckpointLike, argument: str = "base", *, graph: bool = False, hint: str = _ITS_BASE
) -> Checkpoint:
    """The model that `value` is or names.

    Args:
        value: A path, a name on the hub, or what was opened.
        argument: Its name, for messages.
        graph: Whether it may be an ONNX graph.
        hint: What to do instead of naming an adapter.

    Raises:
        UsageError: neither.
        FitError: an adapter, or a graph.
        InputError: see `open_checkpoint`.
    """
    if isinstance(value, Checkpoint):
        return value if graph else _no_graph(value)
    if isinstance(value, str | os.PathLike):
        path = as_path(value, argument)
        files = _model_files(path) if path.is_dir() else []
        alone = path.is_file() and not is_weight_file(path.name)  # one of an adapter's own program
        if alone or (path.is_dir() and (not files or (path / "adapter_config.json").exists())):
            from surgery_formats.adapters.registry import format_at, is_adapter_file

            if all(is_adapter_file(name) for name in files) and format_at(path) is not None:  # pytorch_model_head.bin
                raise FitError(_AN_ADAPTER, file=path, hint=hint)
        return open_checkpoint(path) if graph else _no_graph(open_checkpoint(path))
    if _is_adapter(value):
        raise FitError(_AN_ADAPTER, file=getattr(value, "path", None), hint=hint)
    raise wrong_type(value, argument, "a path or a Checkpoint")


def _no_graph(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, if its weights are a model's, and not a graph's.

    Raises:
        FitError: a graph. Its weights may be transposed, packed and renamed, so that no name tells what they are.
    """
    if checkpoint.is_graph:
        raise FitError(
            "an ONNX graph where the model's own weights were expected",
            file=checkpoint.path,
            hint="give the checkpoint that the graph was exported from; with it as `base=`, merge and insert change a graph itself",
        )
    return checkpoint


def as_adapter(value: AdapterLike, argument: str = "adapter") -> Adapter:
    """The adapter that `value` is or names.

    Raises:
        UsageError: neither, or an adapter with a weight.
        FitError: a full model.
        InputError: see `read_adapter`.
    """
    from surgery_formats.adapters.registry import read_adapter
    from surgery_formats.canonical.adapter import Adapter, WeightedAdapter

    if isinstance(value, Adapter):
        return value
    if isinstance(value, str | os.PathLike):
        return read_adapter(as_path(value, argument))
    if isinstance(value, Checkpoint):
        raise FitError("a full model where an adapter was expected", file=value.path)
    if isinstance(value, WeightedAdapter | tuple):
        raise UsageError(f"{argument} takes no weight here", hint="surgery.combine writes a scaled adapter")
    raise wrong_type(value, argument, "a path or an Adapter")


def as_weighted(value: AdaptersLike, argument: str = "adapters") -> list[WeightedAdapter]:
    """Adapters with their weights, in order; 1 where none is given.

    Raises:
        UsageError: neither an adapter, nor several, nor weights by adapter.
        FitError: a weight that is not finite, or a full model.
        InputError: see `read_adapter`.
    """
    if isinstance(value, Mapping):
        named = ((key, weight, f"{argument}[{str(key)!r}]") for key, weight in value.items())
        return [_scaled(_weighted(key, name), weight, name) for key, weight, name in named]
    if _is_adapter(value) or _is_pair(value):
        return [_weighted(value, argument)]
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise wrong_type(value, argument, "a path, an Adapter, (adapter, weight), a list of these, or {path: weight}")
    return [_weighted(item, f"{argument}[{number}]") for number, item in enumerate(value)]


def as_list(value: Item | Iterable[Item]) -> list[Item]:
    """Several of what may be given as one: a text or a path is never taken apart."""
    return [value] if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable) else list(value)


def output_path(output: StrPath | None, *, dry_run: bool = False) -> Path | None:
    """The path to write to; None for a dry run.

    Raises:
        UsageError: nowhere, and it is no dry run.
    """
    if dry_run:
        return None
    if output is None:
        raise UsageError("output is required", hint="or ask for a dry run")
    return local_path(output, "output")


def local_path(value: StrPath, argument: str) -> Path:
    """A path that is no reference: it is never fetched.

    Raises:
        UsageError: no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise wrong_type(value, argument, "a path")
    if (text := os.fspath(value)) == "":
        raise UsageError(f"{argument} is empty", hint="it is to name a file or a folder")
    if "\0" in text:
        raise UsageError(f"{argument} holds a zero byte, which no name does")
    return to_path(value)


def check_alpha(alpha: float | None) -> None:
    """Check a ``lora_alpha`` that is to be written.

    Raises:
        FitError: not a positive number, or one beyond those that factors can be divided by the root of.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise FitError(f"alpha is {alpha:g}, not a positive number")
    if alpha is not None and not _LEAST_ALPHA <= alpha <= _MOST_ALPHA:
        raise FitError(f"alpha is {alpha:g}; it lies between {_LEAST_ALPHA:g} and {_MOST_ALPHA:g}")


def check_counts(*, least: int = 1, **counts: int | None) -> None:
    """Check arguments that are whole numbers; None is left to the verb.

    Raises:
        UsageError: something else than a whole number.
        FitError: less than `least`, more than 64 bits hold, or more workers or threads than make sense.
    """
    for argument, value in counts.items():
        check_types({argument: "int | None"}, {argument: value})
        if value is not None and value < least:
            raise FitError(f"{argument} is {show(value, 40)}; it is at least {least}")
        most = MOST_THREADS if argument in ("workers", "threads") else LARGEST_COUNT
        if value is not None and value > most:
            raise FitError(f"{argument} is {show(value, 40)}; it is at most {most}")


def _is_adapter(value: object) -> bool:
    from surgery_formats.canonical.adapter import Adapter, WeightedAdapter

    return isinstance(value, str | os.PathLike | Adapter | WeightedAdapter | Checkpoint)


def _is_pair(value: object) -> bool:
    """``(adapter, weight)``, and not two adapters."""
    return isinstance(value, tuple) and len(value) == 2 and _is_adapter(value[0]) and not _is_adapter(value[1])


def _weighted(value: Any, argument: str) -> WeightedAdapter:
    from surgery_formats.canonical.adapter import WeightedAdapter

    if isinstance(value, WeightedAdapter):
        return _scaled(value, 1.0, argument)
    if _is_pair(value):
        return _scaled(_weighted(value[0], argument), value[1], argument)
    return WeightedAdapter(as_adapter(value, argument), 1.0)


def _scaled(adapter: WeightedAdapter, weight: object, argument: str) -> WeightedAdapter:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise wrong_type(weight, f"the weight of {argument}", "a number")
    scaled = adapter * float(weight)
    if not math.isfinite(scaled.weight):
        raise FitError(f"the weight {scaled.weight} is not finite", file=adapter.adapter.path)
    return scaled
