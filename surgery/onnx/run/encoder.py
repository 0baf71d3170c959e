# SPDX-License-Identifier: Apache-2.0
"""Encoders: one run over a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.memory import placed
from surgery.onnx.run.opening import GraphSession
from surgery.onnx.run.ports import as_array, execute, run_options
from surgery.onnx.run.rows import Rows, pad
from surgery.onnx.run.token_tables import token_tables
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.bounded_json import read_object

__all__ = [
    "Classifier",
    "EncoderOutput",
    "adapter_labels",
    "encode",
    "encode_groups",
    "labels",
    "problem_of",
    "run_encoder",
    "softmax",
    "vocabulary",
]

_OF_CHOICES = 3  # axes of an input of choices: all rows are those of one question


@dataclass(frozen=True, slots=True)
class Classifier:
    """What the contract says of the classifier of an adapter; nothing if it has none.

    Attributes:
        names: Its labels in order.
        problem: Its ``problem_type``.
    """

    names: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """The outputs of one run.

    Attributes:
        arrays: Outputs by name, as the graph returns them; values beyond a row's length are padding.
        lengths: Length of each row.
        problem: ``problem_type`` of config.json, or empty.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    lengths: tuple[int, ...]
    problem: str = ""

    def scores(self, row: int, names: Sequence[str]) -> tuple[dict[str, float], ...]:
        """Scores by label, of the text or of each of its tokens; empty for an encoder without labels.

        As in transformers' pipeline: the value itself for a regression, independent probabilities for multiple labels
        or a single one (a softmax over one is always 1), otherwise probabilities that sum to 1.
        """
        if "logits" not in self.arrays:
            return ()
        logits = self.arrays["logits"][row].astype(np.float64)
        tokens = logits[None] if logits.ndim == 1 else logits[: self.lengths[row]]
        if self.problem == "regression":
            shares = tokens
        elif logits.ndim == 1 and (self.problem == "multi_label_classification" or tokens.shape[-1] == 1):
            shares = 0.5 * (1 + np.tanh(tokens / 2))
        else:
            shares = softmax(tokens)
        labels_of_columns = names if len(names) == shares.shape[-1] else [str(n) for n in range(shares.shape[-1])]
        return tuple(dict(zip(labels_of_columns, map(float, row_of_shares), strict=True)) for row_of_shares in shares)


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis, in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    shares: npt.NDArray[np.float64] = weights / weights.sum(-1, keepdims=True)
    return shares


def labels(graph: GraphSession) -> list[str]:
    """``id2label`` of config.json, in order; empty if it is missing or incomplete."""
    return _ordered(_setting(graph, "id2label"))


def _ordered(labels_by_id: object) -> list[str]:
    if not isinstance(labels_by_id, dict) or sorted(labels_by_id) != sorted(str(n) for n in range(len(labels_by_id))):
        return []
    return [str(labels_by_id[str(n)]) for n in range(len(labels_by_id))]


def adapter_labels(entries: Sequence[Mapping[str, Any]]) -> Classifier:
    """The classifier of the first adapter that has its own, by what the graph's contract says of those in use."""
    for entry in entries:
        if "id2label" in entry:
            problem = entry.get("problem_type")
            return Classifier(tuple(_ordered(entry["id2label"])), problem if isinstance(problem, str) else "")
    return Classifier()


def vocabulary(graph: GraphSession) -> int:
    """``vocab_size`` of the config.json beside a graph, else the rows of the table in which it looks tokens up.

    Raises:
        FitError: neither is there.
    """
    size = _setting(graph, "vocab_size")
    if not isinstance(size, int) or size < 1:
        size = token_tables(graph.path).tokens
    if not size:
        raise FitError(
            "neither the graph nor a config.json beside it tells the size of the vocabulary", file=graph.path
        )
    return size


def encode(
    graph: GraphSession,
    rows: Rows,
    slots: Mapping[str, npt.NDArray[Any]] | None = None,
    problem: str = "",
    types: Rows | None = None,
) -> EncoderOutput:
    """Run an encoder on rows of token ids, which are padded on the right.

    Args:
        graph: The opened graph.
        rows: Token ids.
        slots: Arrays of adapters, see `fill_slots`.
        problem: ``problem_type`` of the adapter's classifier; empty for the base's.
        types: Types of the tokens; None for 0.

    Raises:
        FitError: not an encoder, an empty row, a row longer than the graph takes, or an unsupported input.
    """
    contract = graph.contract
    if contract.kind != "encoder":
        raise FitError("this graph is a decoder", file=graph.path)
    if len(rows) > 1 and graph.inputs["input_ids"].shape[0] == 1:  # the model has no token to pad them with
        kinds = types or [[0] * len(row) for row in rows]
        single = [encode(graph, [row], slots, problem, [kind]) for row, kind in zip(rows, kinds, strict=True)]
        joined = {name: np.concatenate([one.arrays[name] for one in single]) for name in single[0].arrays}
        return EncoderOutput(joined, tuple(map(len, rows)), single[0].problem)
    ids, mask = pad(rows, "right", _padding_token(graph))
    if contract.max_length and ids.shape[1] > contract.max_length:
        raise FitError(
            f"{ids.shape[1]} tokens, but the graph's positions end at {contract.max_length}", file=graph.path
        )
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids) if types is None else pad(types, "right")[0],
    }
    if len(graph.inputs["input_ids"].shape) == _OF_CHOICES:
        known = {name: array[None] for name, array in known.items()}
    arrays = run_encoder(graph, known, slots or {})
    return EncoderOutput(arrays, tuple(len(row) for row in rows), problem or problem_of(graph))


def run_encoder(
    graph: GraphSession, known: Mapping[str, npt.NDArray[Any]], slots: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """All outputs for the inputs `known`, of which the graph takes those that it has, and `slots`.

    Raises:
        FitError: an input that is none of these.
    """
    binding = graph.session.io_binding()
    buffers = []  # alive until the run is over
    for name, port in graph.inputs.items():
        if name in known or name in slots:
            array = slots[name] if name in slots else known[name].astype(port.dtype)
            buffers.append(placed(graph.memory, array))
            where = (graph.memory.device, graph.memory.index)
            binding.bind_input(name, *where, port.element, array.shape, buffers[-1].address)
        elif name not in graph.optional:
            raise FitError(
                f"the runner does not support the input '{name}' of a graph without a cache of keys and values",
                file=graph.path,
                hint="text is generated with a graph that has past_key_values; onnxruntime itself runs this one",
            )
    for name in graph.outputs:
        binding.bind_output(name, "cpu")
    execute(graph.session, binding, run_options())
    values = dict(zip(graph.outputs, binding.get_outputs(), strict=True))
    return {name: as_array(value, graph.outputs[name]) for name, value in values.items()}


def encode_groups(
    graph: GraphSession,
    rows: Rows,
    slots: Mapping[str, npt.NDArray[Any]] | None,
    problem: str,
    types: Rows,
    size: int,
) -> EncoderOutput:
    """`encode`, at most `size` rows at a time, unless they are choices of one question; arrays are padded with zeros.

    Raises:
        FitError: see `encode`.
    """
    if size >= len(rows) or len(graph.inputs["input_ids"].shape) == _OF_CHOICES:
        return encode(graph, rows, slots, problem, types)
    starts = range(0, len(rows), size)
    groups = [encode(graph, rows[at : at + size], slots, problem, types[at : at + size]) for at in starts]
    arrays = {name: _stacked([group.arrays[name] for group in groups]) for name in groups[0].arrays}
    return EncoderOutput(arrays, tuple(map(len, rows)), groups[0].problem)


def _stacked(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Arrays one below the other; those of fewer tokens get zeros behind them."""
    if arrays[0].ndim < 2:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    rest = ((0, 0),) * (arrays[0].ndim - 2)
    return np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]), *rest)) for array in arrays])


def _setting(graph: GraphSession, key: str) -> object:
    """A value of the config.json beside the graph; None if there is none."""
    try:
        return read_object(graph.folder / "config.json").get(key)
    except NotFoundError:
        return None


def problem_of(graph: GraphSession) -> str:
    """``problem_type`` of config.json, or empty."""
    value = _setting(graph, "problem_type")
    return value if isinstance(value, str) else ""


def _padding_token(graph: GraphSession) -> int:
    """The padding token, which RoBERTa's positions skip."""
    value = _setting(graph, "pad_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
