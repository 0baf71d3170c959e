# SPDX-License-Identifier: Apache-2.0
"""Every golden adapter, converted to every format: what comes of each pair, and the proof that it is that."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file

import surgery
from surgery_formats.adapters.peft.dialects import BUILT_IN as DIALECTS
from surgery_formats.adapters.registry import format_at, formats, read_adapter
from surgery_formats.binding.parts import in_its_part
from surgery_formats.binding.sizes import sized
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from tests.support.adapter_files import GOLDEN, Arrays, draw, write_mlx

__all__ = [
    "COLUMNS",
    "ROWS",
    "Column",
    "Outcome",
    "Pair",
    "Row",
    "Source",
    "adapters_at",
    "outcome",
    "outcomes",
    "sources_of",
]

RANK = 4  # of LoRAs that stand for other kinds


@dataclass(frozen=True, slots=True)
class Row:
    """A format as people have it: what one reader makes of the files of one program, or of one spelling.

    Attributes:
        title: What the page calls it.
        format: Of the registry, which has to find it.
        files: Patterns of paths in tests/golden.
        example: The path that is tried in every run of the tests.
        alpha: What its files do not state.
        make: Writes one where no file is stored; the base comes second.
        base: Path in tests/golden, for a base that is not beside them.
    """

    title: str
    format: str
    files: tuple[str, ...] = ()
    example: str = ""
    alpha: float | None = None
    make: Callable[[Path], tuple[Path, Path | None]] | None = None
    base: str = ""


def _made_of(golden: str, base: str, **options: Any) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        surgery.convert(GOLDEN / golden, output=folder / "made", base=GOLDEN / base, **options)
        return folder / "made", GOLDEN / base

    return make


def _mlx_vlm(folder: Path) -> tuple[Path, Path]:
    """A folder as mlx-vlm wrote it before it had mlx-lm's configuration."""
    stem = "model.layers.0.self_attn.q_proj"
    width = load_file(GOLDEN / "mlx/llama/base/model.safetensors")[f"{stem}.weight"].shape
    tensors = {f"{stem}.A": draw(1, width[1], 3), f"{stem}.B": draw(2, 3, width[0])}
    return write_mlx(folder / "made", tensors, rank=3, alpha=6.0, dropout=0.0), GOLDEN / "mlx/llama/base"


ROWS: tuple[Row, ...] = (
    Row(
        "PEFT",
        "peft",
        ("gguf/*/peft", "kohya/sd1/peft-*", "torchtune/*/epoch"),
        "gguf/llama/lora/peft",
    ),
    *(
        Row(
            f"PEFT, experts of {one.name}",
            "peft",
            make=_made_of("mlx/gpt_oss/lora-experts", "mlx/gpt_oss/base", to="peft", dialect=one.name),
        )
        for one in DIALECTS
    ),
    Row("MLX-LM", "mlx", ("mlx/*/lora*", "mlx/*/dora*", "mlx/*/full"), "mlx/llama/lora-last1"),
    Row("MLX-LM, npz", "mlx", ("mlx/*/npz",), "mlx/llama/npz", alpha=20),
    Row("MLX-VLM, older", "mlx", make=_mlx_vlm),
    Row("AdapterHub", "adapterhub", ("adapterhub/*",), "adapterhub/llama-lora"),
    Row("torchtune", "torchtune", ("torchtune/*/epoch/adapter_model.pt",), "torchtune/llama/epoch/adapter_model.pt"),
    Row("litgpt", "litgpt", ("litgpt/*",), "litgpt/default"),
    Row("loralib", "loralib", ("loralib/*.pt",), "loralib/none.pt", alpha=12),
    Row("NeMo", "nemo", ("nemo/*",), "nemo/canonical/adapter.nemo", base="litgpt/base"),
    Row("TensorRT-LLM", "tensorrt-llm", ("tensorrt_llm/*",), "tensorrt_llm/all", base="litgpt/base"),
    Row("KerasHub", "keras", ("keras/*/*",), "keras/llama/lora"),
    Row("GGUF LoRA", "gguf", ("gguf/*.gguf",), "gguf/llama/lora/adapter.gguf"),
    Row(".onnx_adapter", "onnx-adapter", ("onnx_adapter/*",), "onnx_adapter/llama/adapter.onnx_adapter"),
    Row(
        "kohya, diffusers' names",
        "kohya",
        ("kohya/sd1/*", "kohya/sdxl/diffusers-names*"),
        "kohya/sd1/lora/adapter.safetensors",
    ),
    Row(
        "kohya, original names",
        "kohya",
        ("kohya/sdxl/sgm-names/*", "kohya/sdxl/mixed/*"),
        "kohya/sdxl/sgm-names/adapter.safetensors",
    ),
    Row("LyCORIS", "kohya", ("lycoris/*",), "lycoris/locon/adapter.safetensors"),
    Row("OneTrainer, OFT", "kohya", ("onetrainer/oft-*/*",), "onetrainer/oft-own/adapter.safetensors"),
    Row(
        "OneTrainer, older",
        "kohya",
        ("onetrainer/legacy.safetensors",),
        "onetrainer/legacy.safetensors",
        base="flux/base-bfl.safetensors",
    ),
    Row("OMI", "omi", ("onetrainer/omi.safetensors",), "onetrainer/omi.safetensors", base="flux/base-bfl.safetensors"),
    Row("diffusers", "diffusers", ("dotted/diffusers/*",), "dotted/diffusers/adapter.safetensors"),
    Row(
        "diffusers, lora.down",
        "diffusers",
        ("dotted/diffusers-lora-down/*",),
        "dotted/diffusers-lora-down/adapter.safetensors",
    ),
    Row(
        "diffusers, processors",
        "diffusers",
        ("dotted/diffusers-processors/*",),
        "dotted/diffusers-processors/adapter.safetensors",
    ),
    Row("LightX2V", "comfyui", ("dotted/lightx2v/*",), "dotted/lightx2v/adapter.safetensors"),
    Row("DiffSynth", "bare", ("dotted/diffsynth/*",), "dotted/diffsynth/adapter.safetensors"),
    *(
        Row(title, "bare", (f"flux/{name}/*",), f"flux/{name}/adapter.safetensors", base="flux/base-bfl.safetensors")
        for title, name in {"XLabs": "xlabs", "fal": "fal", "Flux control": "control"}.items()
    ),
    Row("Lightning", "bare", ("dotted/lightning/*",), "dotted/lightning/adapter.safetensors"),
    Row("textual inversion, A1111", "embedding", ("textual_inversion/*",), "textual_inversion/fluffy.safetensors"),
    Row(
        "textual inversion, diffusers",
        "learned-embeds",
        ("textual_inversion/*",),
        "textual_inversion/learned_embeds.safetensors",
    ),
    Row("compact", "compact", make=_made_of("mlx/llama/lora-last1", "mlx/llama/base", to="compact")),
)
"""Every format that is read. A format of the registry, a dialect or a golden adapter without a row fails a test."""


@dataclass(frozen=True, slots=True)
class Column:
    """A format that is written, or a dialect of experts in which it is."""

    format: str
    dialect: str = ""

    def __str__(self) -> str:
        return self.dialect or self.format


COLUMNS: tuple[Column, ...] = (
    *(Column(name) for name in sorted(formats())),
    *(Column("peft", one.name) for one in DIALECTS),
)


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter of a row.

    Attributes:
        row: Its row.
        name: Where it lies in tests/golden, or the row's title.
        adapter: As it is read.
        base: The model it was trained on; None for textual inversions.
    """

    row: Row
    name: str
    adapter: Adapter
    base: Checkpoint | None

    @property
    def has_experts(self) -> bool:
        """Whether dialects matter to it."""
        return any(site.module_kind == "experts" or "expert" in site.path for site in self.adapter.updates)

    @property
    def columns(self) -> tuple[Column, ...]:
        """What it is converted to."""
        return tuple(column for column in COLUMNS if not column.dialect or self.has_experts)


@cache
def adapters_at(room: Path) -> tuple[tuple[Path, str], ...]:
    """Golden adapters and the formats that know them; files in an adapter's folder only where another format does."""
    found: dict[Path, str] = {}
    for path in sorted(room.rglob("*")):
        known = None if "base" in path.parts or path.suffix == ".py" else format_at(path)
        if known is None or "expected" in path.name:
            continue
        outer = found.get(path.parent)
        if outer is None or (known.name not in (outer, "bare") and path.suffix in (".pt", ".gguf")):
            found[path] = known.name
    return tuple(found.items())


def row_of(path: Path, format: str) -> Row:
    """The row of a golden adapter.

    Raises:
        AssertionError: it has none, or several.
    """
    name = path.relative_to(GOLDEN).as_posix()
    rows = [row for row in ROWS if row.format == format and any(fnmatchcase(name, pattern) for pattern in row.files)]
    assert len(rows) == 1, f"{name} ({format}) is of {len(rows)} rows of tests/support/matrix.py"
    return rows[0]


def base_of(path: Path) -> Path | None:
    """The base of a golden adapter: beside it, or above."""
    parts = path.relative_to(GOLDEN).parts
    if parts[0] == "adapterhub":  # three models, and adapters named after them
        return GOLDEN / "adapterhub/base" / parts[1].partition("-")[0]
    for folder in path.parents[: len(parts) - 1]:
        if (folder / "model.safetensors").exists():
            return folder
        for beside in (folder / "base.safetensors", folder / "base"):
            if beside.exists():
                return beside
    return None


REFUSED: Mapping[str, str] = {
    "loralib/fused.pt": "MergedLinear",
    "torchtune/llama-dora/epoch": "use_dora is false",
}
"""Golden adapters that no command reads, and what it says of them."""


def sources_of(row: Row, folder: Path, *, example: bool) -> Iterator[Source]:
    """The adapters of a row, or its example alone; `folder` is for one that has to be made."""
    if row.make is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path, base = row.make(folder)
        yield Source(row, row.title, _read(path, row), None if base is None else _base(base))
        return
    for path, known in [(GOLDEN / row.example, row.format)] if example else adapters_at(GOLDEN):
        name = path.relative_to(GOLDEN).as_posix()
        if name in REFUSED or row_of(path, known) is not row:
            continue
        base = GOLDEN / row.base if row.base else base_of(path)
        yield Source(row, name, _read(path, row), None if base is None else _base(base))


def _read(path: Path, row: Row) -> Adapter:
    adapter = read_adapter(path, row.alpha)
    assert adapter.format == row.format
    return adapter


@cache
def _base(path: Path) -> Checkpoint:
    return open_checkpoint(path)


Word = Literal["exact", "folded", "approximated", "impossible"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes of a conversion.

    Attributes:
        word: The worst of what became of its updates, or that it is impossible.
        error: The certified error of what is approximated.
        why: Why it is impossible.
        as_lora: Whether LoRAs stand for other kinds.
        by_part: Whether each part of a pipeline is written by itself.
    """

    word: Word
    error: float = 0.0
    why: str = ""
    as_lora: bool = False
    by_part: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversion and what came of it."""

    source: Source
    column: Column
    outcome: Outcome


def outcomes(source: Source, folder: Path) -> Iterator[Pair]:
    """Convert an adapter to every format, and prove what is written.

    Raises:
        AssertionError: what was written is not what was meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    effect = _Effect(source, folder)
    for number, column in enumerate(source.columns):
        yield Pair(source, column, _outcome(source, column, effect, folder / str(number), RANK))


def outcome(source: Source, column: Column, folder: Path, rank: int | None = RANK) -> Outcome:
    """Convert an adapter to one format, to LoRAs only if a rank is given.

    Raises:
        AssertionError: what was written is not what was meant.
    """
    folder.mkdir()
    return _outcome(source, column, _Effect(source, folder), folder / "to", rank)


def _outcome(source: Source, column: Column, effect: _Effect, folder: Path, rank: int | None) -> Outcome:
    parts = sorted({site.component for site in source.adapter.updates})
    ways: list[dict[str, Any]] = [{"": {}}]
    if len(parts) > 1 and rank:
        ways.append({part: {"component": part} for part in parts})
    options: list[dict[str, Any]] = [{}]
    if rank and any(update.low_rank() is None for chain in source.adapter.updates.values() for update in chain):
        options += [{"as_lora": True}, {"as_lora": True, "rank": rank}]
    refused: list[FitError] = []
    for option, way in product(options, ways):
        folder.mkdir()
        try:
            results = [_converted(source, column, folder / f"to{part}", **option, **more) for part, more in way.items()]
        except FitError as error:
            refused.append(error)
            shutil.rmtree(folder)
            continue
        error = max(result.max_approximation for result in results)
        effect.check(list(map(_read_back, results)), column.format, error)
        shutil.rmtree(folder)
        found = {entry.outcome for result in results for entry in result.entries}
        worst = next(word for word in WORST if word in found)
        return Outcome(worst, error, as_lora=bool(option), by_part=len(way) > 1)
    return Outcome("impossible", why=_reason(source, column, refused[0]))


WORST: tuple[Word, ...] = ("approximated", "folded", "exact")
SUFFIXES = {"gguf": ".gguf", "loralib": ".pt", "onnx-adapter": ".onnx_adapter"}


def _converted(source: Source, column: Column, where: Path, **options: Any) -> surgery.ConvertResult:
    suffix = SUFFIXES.get(column.format, ".safetensors") if formats()[column.format].single_file else ""
    return surgery.convert(
        source.adapter,
        column.format,
        output=f"{where}{suffix}",
        base=source.base,
        dialect=column.dialect or None,
        **options,
    )


def _read_back(result: surgery.ConvertResult) -> Adapter:
    """What was written, with the alpha that a reader is told to give."""
    assert result.output is not None
    told = [found for warning in result.warnings if (found := re.search(r"read with alpha (\S+)", warning))]
    return read_adapter(result.output, float(told[0][1]) if told else None)


def _reason(source: Source, column: Column, error: FitError) -> str:
    """What the writer says of what it drops, or the error where it says nothing."""
    target = formats()[column.format]
    adapter = source.adapter
    if source.base is not None:
        adapter = sized(in_its_part(adapter, source.base), source.base)
    try:
        entries = target.render(adapter, source.base).entries
    except SurgeryError:
        return error.message
    dropped = [entry.detail for entry in entries if entry.outcome == "dropped"]
    if not dropped:
        return error.message
    some = "some parts: " if len(dropped) < len(entries) else ""
    return some + "; ".join(sorted(dict.fromkeys(detail.partition(": ")[2] or detail for detail in dropped)))


class _Effect:
    """What an adapter does to its base; where there is nothing to merge, the numbers that it has."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.weights: Arrays | None = None
        if source.base is not None:
            try:
                self.weights = self._merged([source.adapter])
            except FitError:
                self.weights = None
        self.numbers = None if self.weights is not None else _numbers(source.adapter)

    def _merged(self, adapters: list[Any]) -> Arrays:
        assert self.source.base is not None
        out = self.folder / "merged"
        surgery.merge(self.source.base, adapters, output=out)
        found = {
            f"{file.parent.relative_to(out)}/{name}": value
            for file in sorted(out.rglob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        shutil.rmtree(out)
        return found

    def check(self, written: list[Adapter], format: str, error: float) -> None:
        """`written` does the same, up to what a float of the base can tell, or within the certified error."""
        assert {one.format for one in written} == {format}, [(one.format, one.path) for one in written]
        if self.weights is None:
            assert np.array_equal(np.sort(np.concatenate([_numbers(one) for one in written])), self.numbers)
            return
        assert self.source.base is not None
        before, got = _stored(self.source.base.path), self._merged(written)
        assert got.keys() == self.weights.keys(), sorted(got.keys() ^ self.weights.keys())[:5]
        groups: dict[str, list[str]] = {}
        for name in self.weights:  # the error of a stack of experts is that of the stack
            groups.setdefault(_STACKED.sub(r"\1", name) if error else name, []).append(name)
        for name, members in groups.items():
            wanted = np.concatenate([self.weights[one].reshape(-1) for one in members])
            change = wanted - np.concatenate([_grown(before[one], self.weights[one]).reshape(-1) for one in members])
            missed = np.concatenate([got[one].astype(np.float64).reshape(-1) for one in members]) - wanted
            rounding = float(np.finfo(wanted.dtype).eps) * abs(wanted).max()
            if error:
                limit = 1.0001 * error * np.linalg.norm(change) + rounding * wanted.size**0.5
                assert np.linalg.norm(missed) <= limit, f"{name}: {np.linalg.norm(missed) / np.linalg.norm(change):.3g}"
            else:
                assert abs(missed).max() <= 1e-6 * abs(change).max() + rounding, name


def _grown(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """In float64, with zeros where a weight has new inputs."""
    grown = np.zeros(like.shape)
    grown[tuple(slice(size) for size in values.shape)] = values
    return grown


_STACKED = re.compile(r"(experts\.)\d+\..*")


def _numbers(adapter: Adapter) -> np.ndarray:
    """All numbers of its tensors that do something, in order of size."""
    idle = {entry.tensor.name for entry in adapter.ignored}
    told = [tensor.read().astype(np.float64).reshape(-1) for tensor in adapter.tensors if tensor.name not in idle]
    return np.sort(np.concatenate(told))


@cache
def _stored(root: Path) -> Arrays:
    files = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    top = root.parent if root.is_file() else root
    return {
        f"{file.parent.relative_to(top)}/{name}": value for file in files for name, value in load_file(file).items()
    }
