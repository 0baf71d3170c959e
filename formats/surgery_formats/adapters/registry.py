# SPDX-License-Identifier: Apache-2.0
"""Formats by name, and the one that a path is of. What reads and writes a format is imported when it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from surgery_formats.adapters.adapterhub import ADAPTERHUB
from surgery_formats.adapters.bare import BARE
from surgery_formats.adapters.comfyui import COMFYUI
from surgery_formats.adapters.compact import COMPACT
from surgery_formats.adapters.diffusers import DIFFUSERS
from surgery_formats.adapters.format import Format, Inserting, OnlyRead, TakesAlpha
from surgery_formats.adapters.gguf import GGUF_LORA
from surgery_formats.adapters.grammar.files import keys_at
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.keras import KERAS
from surgery_formats.adapters.kohya import KOHYA
from surgery_formats.adapters.litgpt import LITGPT
from surgery_formats.adapters.loralib import LORALIB
from surgery_formats.adapters.mlx import MLX
from surgery_formats.adapters.nemo import NEMO
from surgery_formats.adapters.omi import OMI
from surgery_formats.adapters.onnx_adapter import ONNX_ADAPTER
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.tensorrt_llm import TENSORRT_LLM
from surgery_formats.adapters.textual_inversion import EMBEDDING, LEARNED_EMBEDS
from surgery_formats.adapters.torchtune import TORCHTUNE
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.inserted import InsertedModule
from surgery_formats.containers.sharded import open_folder_tensors
from surgery_formats.errors import FitError, MalformedError, NotFoundError, SurgeryError, UsageError
from surgery_formats.files.places import entries, is_folder
from surgery_formats.files.remote.path import to_path
from surgery_formats.models.factor_names import named_adapter
from surgery_formats.models.known_files import refuse_known
from surgery_formats.plugins import with_plugins
from surgery_formats.text import closest, listing, show

__all__ = [
    "BUILT_IN",
    "ENTRY_POINTS",
    "format_at",
    "format_named",
    "format_to_write",
    "formats",
    "inserted_modules",
    "is_adapter_file",
    "read_adapter",
    "refuse_unread",
    "told_alpha",
]

_LOOKED_AT = 100  # entries of a folder that is no adapter

BUILT_IN: tuple[Format, ...] = (
    TORCHTUNE,
    LITGPT,
    PEFT,
    MLX,
    ADAPTERHUB,
    KOHYA,
    COMPACT,
    OMI,
    LORALIB,  # before diffusers, whose files may begin like GPT-2's modules
    DIFFUSERS,
    COMFYUI,
    BARE,
    GGUF_LORA,
    ONNX_ADAPTER,
    TENSORRT_LLM,
    NEMO,
    KERAS,
    EMBEDDING,
    LEARNED_EMBEDS,
)
ENTRY_POINTS = "surgery.adapter_formats"  # a plugin's entry point is an object like those above


def formats() -> dict[str, Format]:
    """Every format by name: the built-in ones, then plugins'.

    Raises:
        SurgeryError: see `surgery_formats.plugins.with_plugins`.
    """
    return with_plugins(ENTRY_POINTS, BUILT_IN, "format", Format)


def format_named(name: str) -> Format:
    """The format called `name`.

    Raises:
        UsageError: not a name.
        NotFoundError: no such format.
    """
    if not isinstance(name, str):
        raise UsageError(f"a format is named, as in 'peft', not {type(name).__name__}")
    if name not in formats():
        hint = closest(name, formats()) or f"there are {listing(sorted(formats()), 30)}"
        raise NotFoundError(f"no adapter format '{name}'", hint=hint)
    return formats()[name]


def format_to_write(name: str) -> Format:
    """The format called `name`, for an output.

    Raises:
        UsageError: not a name.
        NotFoundError: no such format.
        FitError: it is only read.
    """
    known = format_named(name)
    if isinstance(known, OnlyRead):
        raise FitError(f"{name} is only read: {known.only_read}", hint="choose another format with `to=`")
    return known


def format_at(path: Path) -> Format | None:
    """The format of a file or folder, by content; None if it is of none."""
    candidates = sorted(formats().values(), key=_has_no_mark)
    return next((candidate for candidate in candidates if candidate.detect(path)), None)


def _has_no_mark(candidate: Format) -> bool:
    """Whether files are taken for its own by their leaves alone, so that all others, plugins' too, are asked first."""
    return isinstance(candidate, WeightFileFormat) and not candidate.dialect.own


def inserted_modules(adapter: Adapter) -> tuple[InsertedModule, ...]:
    """The modules that an adapter inserts into a network, in the network's order; none for most.

    Raises:
        FitError, MalformedError: see `Inserting`.
    """
    known = formats().get(adapter.format)
    return known.inserted(adapter) if isinstance(known, Inserting) else ()


def is_adapter_file(name: str) -> bool:
    """Whether a file of weights, or an index, has a name that a format gives its own."""
    stems = (name.partition(".")[0], name.rpartition(".")[0])
    return any(fnmatchcase(stem, own) for known in formats().values() for own in known.file_stems for stem in stems)


def refuse_unread(path: Path, *, networks: bool = True) -> None:
    """Say what an adapter is that no format reads; nothing is said of other files.

    Args:
        path: Of the file, or of a folder with it alone.
        networks: Whether a network that stands beside a model, as a ControlNet does, is named too.

    Raises:
        FitError: it is one.
    """
    names = keys_at(path).keys() or _names_in(path)
    refuse_known(path, names, networks=networks)
    if what := named_adapter(names):
        raise FitError(f"{what}, which no format here reads", file=path)


def _names_in(path: Path) -> Collection[str]:
    """The names of the tensors of a folder whose file of weights is called as a model's; none of a model, or of a file."""
    return () if not path.is_dir() or (path / "config.json").exists() else _tensors_in(path)


def _tensors_in(path: Path) -> Collection[str]:
    """The names of the tensors of a folder; none if it cannot be read as weights."""
    try:
        return open_folder_tensors(path).tensors.keys()
    except (SurgeryError, OSError, ValueError):
        return ()


def told_alpha(known: Format, path: Path, alpha: float) -> Format:
    """The format of the file at `path`, told the alpha that such a file may lack.

    Raises:
        FitError: its files state every scale.
    """
    if not isinstance(known, TakesAlpha):
        raise FitError(f"an alpha was given, and files of {known.name} state their scale", file=path)
    if not math.isfinite(alpha):
        raise FitError(f"the alpha {alpha} is not finite", file=path)
    return known.with_alpha(float(alpha))


def read_adapter(path: str | os.PathLike[str], alpha: float | None = None) -> Adapter:
    """Read an adapter of any known format, found by content.

    Args:
        path: File or folder.
        alpha: What a file that does not state it was trained with.

    Raises:
        NotFoundError: nothing there.
        MalformedError: no format knows it.
        FitError: it is known what it is, and no format reads it; or its format states every scale.
        InputError, FitError: as the format's reader.
    """
    where = to_path(path)
    if not where.exists():
        raise NotFoundError("no such file or folder", file=where)
    if (known := format_at(where)) is not None:
        return (known if alpha is None else told_alpha(known, where, alpha)).read(where)
    if (where / "config.json").is_file():
        refuse_known(where, _tensors_in(where), networks=True)
        raise MalformedError(
            "a full model where an adapter was expected",
            file=where,
            hint="were the base and the adapter given the other way round? of a fine-tune, extract-lora makes an adapter",
        )
    refuse_unread(where)
    if where.suffix == ".onnx":
        raise MalformedError(
            "an ONNX graph where an adapter was expected", file=where, hint='`to="safetensors"` converts its weights'
        )
    what, hint = _what_is_missing(where)
    raise MalformedError(what, file=where, hint=hint)


def _what_is_missing(where: Path) -> tuple[str, str]:
    """What is the matter with a path that no format knows, and what to do."""
    known = f"known: {listing(formats(), 20)}"
    if where.is_dir():
        inside = [entry for entry in entries(where) if not entry.name.startswith(".")]
        if not inside:
            return "an empty folder where an adapter was expected", known
        below = [str(entry) for entry in inside[:_LOOKED_AT] if is_folder(entry) and format_at(entry) is not None]
        if below:
            return "a folder of adapters where one was expected", f"name one of {listing(below)}"
    elif format_at(where.parent) is not None:
        return "one file of an adapter that is a folder", f"name the folder: {show(str(where.parent), 200)}"
    return "not an adapter of a known format", known
