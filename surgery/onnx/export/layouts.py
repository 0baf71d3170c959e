# SPDX-License-Identifier: Apache-2.0
"""Where other programs look for a graph and its weights, and what they want beside them.

A layout only names and places files: offsets into a weight file do not change when it gets another name. ``plain`` is
what `surgery.export_onnx` writes by itself. What each program looks up was read in its source: transformers.js 4.3,
optimum-onnx 0.1, sentence-transformers 5.1, onnxruntime-genai 0.18, Triton's onnxruntime backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery.onnx.export.place import Mode
from surgery.onnx.graph.build import GraphSet
from surgery.onnx.graph.contract import Contract, contract_of
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.families.tasks import FEATURES
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

    from surgery.engine.plan import Plan

__all__ = [
    "LAYOUTS",
    "Arrangement",
    "Layout",
    "arrange",
    "check_layout",
    "layout_named",
    "layout_warnings",
]

GRAPH = "model.onnx"
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "int4": "_q4"}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a program expects.

    Attributes:
        name: As in ``--layout``.
        below: Folder of graphs and weights in the output; empty for the output itself.
        numbered: Whether weight files are called ``model.onnx_data``, ``model.onnx_data_1``, ...
        by_type: Whether the graph's name tells its type, ``model_fp16.onnx``.
        companions: Whether graphs and settings for other runtimes come along.
        defaults: Whether the program passes by inputs that have a default, so that keys and values of a prompt are used.
        factors: Whether it can give factors to slots.
    """

    name: str
    below: str = ""
    numbered: bool = False
    by_type: bool = False
    companions: bool = False
    defaults: bool = False
    factors: bool = False


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("plain", companions=True, defaults=True, factors=True),
        Layout("transformers.js", "onnx", numbered=True, by_type=True),
        Layout("optimum"),
        Layout("sentence-transformers", "onnx"),
        Layout("genai", companions=True, factors=True),
        Layout("triton", "1", factors=True),
    )
}


def layout_named(name: str) -> Layout:
    """The layout of this name.

    Raises:
        FitError: there is none.
    """
    if name not in LAYOUTS:
        raise FitError(f"'{show(name, 40)}' is not a layout", hint=f"one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def check_layout(layout: Layout, contract: Contract, *, genai: bool, embedded: bool) -> None:
    """Check that the program can run such a graph.

    Raises:
        FitError: it cannot, or it would compute the base without a word.
    """
    swapped = any(facts["mode"] == "swapped" for facts in contract.adapters)
    if swapped and not layout.factors:
        raise FitError(f"{layout.name} gives no factors to slots: the graph would be the base", hint="`merge=`")
    if contract.virtual_tokens and contract.cache != "none" and not layout.defaults and not genai:
        raise FitError(
            f"{layout.name} always gives a past of its own: the soft prompt would have no effect",
            hint='`layout="plain"`, or `prompt_form="rows"`',
        )
    if layout.name == "genai" and contract.encoder:
        raise FitError(
            "onnxruntime-genai takes the keys and values of an encoder's result from the encoder's graph, and knows of "
            "encoder-decoders Whisper and Marian alone",
            hint='`layout="plain"`',
        )
    if layout.name == "genai" and not genai:
        raise FitError("onnxruntime-genai runs decoders that generate", hint='`layout="plain"`')
    if layout.name == "triton" and contract.encoder:
        raise FitError(
            "one model of Triton is one graph, and this has an encoder's and a decoder's", hint='`layout="plain"`'
        )
    if layout.name == "sentence-transformers" and contract.kind == "decoder":
        raise FitError("sentence-transformers runs no graph that generates", hint='`task="feature-extraction"`')
    if layout.numbered and contract.encoder and contract.weights and not embedded:
        raise FitError(
            f"{layout.name} looks for weights of each graph of an encoder-decoder", hint='`weights="embed"`, or "auto"'
        )
    if layout.by_type and contract.dtype not in _SUFFIXES:
        raise FitError(f"{layout.name} has no name for a graph in {contract.dtype}", hint='`dtype="fp16"`')


def layout_warnings(layout: Layout, contract: Contract, *, pooled: bool) -> list[str]:
    """What the program does that the graph does not take, and what nobody does: `pooled` is a model with modules for it."""
    if layout.name == "plain" and pooled and contract.task == FEATURES:
        return [
            "the model has modules of sentence-transformers, and this graph gives the states of tokens: --task "
            "sentence-similarity pools them"
        ]
    pads = layout.name in ("transformers.js", "optimum") and not contract.encoder
    if contract.kind == "decoder" and contract.padding == "right" and pads:
        return [
            f"{layout.name} pads the rows of a batch on the left, for which this graph answers NaN: one row at a time, "
            "or --target portable"
        ]
    return []


@dataclass(frozen=True)
class Arrangement:
    """The names of one export.

    Attributes:
        layout: The layout.
        weights: New names of weight files, within the graph's folder.
        graph: Name of the main graph there.
        files: Paths in the output, by the names that the export itself has.
    """

    layout: Layout
    weights: Mapping[str, str] = field(default_factory=dict)
    graph: str = GRAPH
    files: Mapping[str, str] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Where a file of the export lies in the output."""
        return self.files.get(name, name)

    def contract(self, contract: Contract) -> Contract:
        """The same contract about files of other names."""
        files = tuple(replace(file, name=self.weights.get(file.name, file.name)) for file in contract.weights)
        encoder = self.path(contract.encoder).rpartition("/")[2] if contract.encoder else ""
        return replace(contract, weights=files, encoder=encoder)

    @property
    def keeps_names(self) -> bool:
        """Whether a graph is written as it was built."""
        return not self.weights and not self.layout.by_type and self.layout.name != "triton"

    def apply(self, model: onnx.ModelProto) -> None:
        """Rename the weight files that a graph refers to, in place."""
        if not self.weights and not self.layout.by_type:
            return
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = self.weights.get(entry.value, entry.value)
        contract = contract_of(model)
        assert contract is not None
        stated = self.contract(contract).as_metadata()
        for entry in model.metadata_props:
            entry.value = stated.get(entry.key, entry.value)

    def plan(self, plan: Plan) -> Plan:
        """The same plan with files of other names."""
        return replace(plan, files=tuple(replace(file, name=self.path(file.name)) for file in plan.files))

    def config(self, config: Mapping[str, Any], dtype: str) -> dict[str, Any] | None:
        """The configuration with what the program reads there; None if it reads nothing."""
        if self.layout.name != "transformers.js":
            return None
        settings = {"dtype": {"int8": "int8", "int4": "q4"}.get(dtype, dtype)}
        external = {"use_external_data_format": {self.graph: len(self.weights)}} if self.weights else {}
        return {**config, "transformers.js_config": {**settings, **external}}


def arrange(layout: Layout, mode: Mode, draft: GraphSet, graph_type: str) -> Arrangement:
    """Name all files of an export.

    Where computed weights lie beside the base's, the base's get another name: under their own they would pass for the
    merged model in any program that loads a folder of weights.

    Args:
        layout: The layout.
        mode: How the graphs get their weights: in the base's own folder all names are as they are.
        draft: The graphs, with the weight files that they read.
        graph_type: Type of weights that names the graph: ``fp32``, ``fp16``, ``int8``, ``int4``.

    Raises:
        FitError: the layout's names are not those of the base's folder, or it has none for this type.
    """
    if mode == "reference":
        if layout.below:
            raise FitError(f"the layout of {layout.name} needs a folder of its own", hint="write to another folder")
        return Arrangement(layout)
    if layout.by_type and graph_type not in _SUFFIXES:
        raise FitError(f"{layout.name} has no name for a graph of {graph_type}", hint='`weights_type="int8"`')
    files = () if mode == "embed" else draft.files
    sources = [file.path.name for file in files if isinstance(file, File)]
    computed = [file.path.name for file in files if not isinstance(file, File)]
    weights = (*sources, *computed)
    suffix = _SUFFIXES[graph_type] if layout.by_type else ""
    graph = f"model{suffix}.onnx"
    if layout.numbered:
        names = {name: f"{graph}_data{f'_{number}' if number else ''}" for number, name in enumerate(weights)}
    else:
        names = {name: _as_base(name) for name in sources} if computed else {}
    below = f"{layout.below}/" if layout.below else ""
    placed = {name: f"{below}{names.get(name, name)}" for name in weights}
    placed |= {name: f"{below}{name.removesuffix('.onnx')}{suffix}.onnx" for name in draft.graphs}
    moved = {name: path for name, path in placed.items() if path != name}
    return Arrangement(layout, names, graph, moved)


def _as_base(name: str) -> str:
    """``model-00001-of-00002.safetensors`` -> ``base-00001-of-00002.safetensors``."""
    return f"base{name.removeprefix('model')}" if name.startswith("model") else f"base-{name}"
