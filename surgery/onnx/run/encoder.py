# SPDX-License-Identifier: Apache-2.0
"""Encoders: one run over a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.binding import as_array, execute, not_recorded
from surgery.onnx.run.opening import Opened
from surgery.onnx.run.rows import Rows, pad
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.bounded_json import read_object

__all__ = ["Encoded", "encode", "labels", "vocabulary"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Outputs of one run.

    Attributes:
        arrays: By name, as the graph gives them; what stands behind a row's length is padding.
        lengths: Of the rows.
        problem: ``problem_type`` of config.json, or empty.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    lengths: tuple[int, ...]
    problem: str = ""

    def scores(self, row: int, names: Sequence[str]) -> tuple[dict[str, float], ...]:
        """Scores by label, of the text or of each of its tokens; empty for an encoder without labels.

        They are what transformers' pipeline gives: the value itself of a regression, a probability of its own for each of several labels
        or for a single one (a softmax of one is always 1), else probabilities that sum up to 1.
        """
        if "logits" not in self.arrays:
            return ()
        logits = self.arrays["logits"][row].astype(np.float64)
        each = logits[None] if logits.ndim == 1 else logits[: self.lengths[row]]
        if self.problem == "regression":
            shares = each
        elif logits.ndim == 1 and (self.problem == "multi_label_classification" or each.shape[-1] == 1):
            shares = 0.5 * (1 + np.tanh(each / 2))
        else:
            weights = np.exp(each - each.max(-1, keepdims=True))
            shares = weights / weights.sum(-1, keepdims=True)
        known = names if len(names) == shares.shape[-1] else [str(n) for n in range(shares.shape[-1])]
        return tuple(dict(zip(known, map(float, one), strict=True)) for one in shares)


def labels(opened: Opened) -> list[str]:
    """``id2label`` of config.json, in order; empty if it does not say."""
    try:
        found = read_object(opened.folder / "config.json").get("id2label")
    except NotFoundError:
        return []
    if not isinstance(found, dict) or sorted(found) != sorted(str(n) for n in range(len(found))):
        return []
    return [str(found[str(n)]) for n in range(len(found))]


def vocabulary(opened: Opened) -> int:
    """``vocab_size`` of config.json.

    Raises:
        NotFoundError: there is none beside the graph.
        FitError: it does not say.
    """
    found = read_object(opened.folder / "config.json").get("vocab_size")
    if not isinstance(found, int) or found < 1:
        raise FitError("config.json beside the graph does not say how large the vocabulary is", file=opened.path)
    return found


def encode(opened: Opened, rows: Rows) -> Encoded:
    """Run an encoder on rows of token ids, which are padded on the right.

    Raises:
        FitError: not an encoder, an empty row, a row longer than the graph takes, an input that the runner does not know.
    """
    contract = opened.contract
    if contract.kind != "encoder":
        raise FitError("this graph is a decoder", file=opened.path)
    ids, mask = pad(rows, "right", _filler(opened))
    if contract.max_length and ids.shape[1] > contract.max_length:
        raise FitError(f"{ids.shape[1]} tokens, the graph's positions end at {contract.max_length}", file=opened.path)
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    binding = opened.session.io_binding()
    for name, port in opened.inputs.items():
        if name in known:
            binding.bind_cpu_input(name, known[name].astype(port.dtype))
        elif name not in opened.optional:
            raise FitError(f"the runner does not know the input '{name}'", file=opened.path)
    for name in opened.outputs:
        binding.bind_output(name, "cpu")
    execute(opened.session, binding, not_recorded())
    values = dict(zip(opened.outputs, binding.get_outputs(), strict=True))
    arrays = {name: as_array(value, opened.outputs[name]) for name, value in values.items()}
    return Encoded(arrays, tuple(len(row) for row in rows), _problem(opened))


def _problem(opened: Opened) -> str:
    try:
        found = read_object(opened.folder / "config.json").get("problem_type")
    except NotFoundError:
        return ""
    return found if isinstance(found, str) else ""


def _filler(opened: Opened) -> int:
    """The padding token: RoBERTa's positions leave it out."""
    try:
        found = read_object(opened.folder / "config.json").get("pad_token_id")
    except NotFoundError:
        return 0
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else 0
