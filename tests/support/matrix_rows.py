# SPDX-License-Identifier: Apache-2.0
"""Golden adapters by the formats that people have them in, and the formats they are converted to: rows and columns of the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

import surgery
from surgery_formats.adapters.peft.dialects import BUILT_IN as DIALECTS
from surgery_formats.adapters.registry import format_at, formats, read_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from tests.support.adapter_files import GOLDEN, draw, write_mlx

__all__ = ["COLUMNS", "REFUSED", "ROWS", "Column", "Row", "Source", "adapters_at", "row_of", "sources_of"]


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


_NO_ROWS = {"base", "onnx_graphs", "bottlenecks", "adapterhub_prefix"}
"""Bases, adapters that lie beside graphs, of which another table is made, and the library's bottlenecks and prefixes."""


@cache
def adapters_at(room: Path) -> tuple[tuple[Path, str], ...]:
    """Golden adapters and the formats that know them; files in an adapter's folder only where another format does."""
    found: dict[Path, str] = {}
    for path in sorted(room.rglob("*")):
        known = None if _NO_ROWS & set(path.parts) or path.suffix == ".py" else format_at(path)
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
    assert len(rows) == 1, f"{name} ({format}) is of {len(rows)} rows of tests/support/matrix_rows.py"
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
