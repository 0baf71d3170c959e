# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer, by whatever name programs have for them, inside the stacks that the model's code holds.

transformers stacks all experts of a layer in ``experts.gate_up_proj`` and ``experts.down_proj``. Programs name their
parts: a stack for each projection (MLX: ``switch_mlp.gate_proj.weight``, Tinker: ``experts.w1``), or every expert by
itself (``experts.3.up_proj.weight``; Unsloth's gpt-oss: ``experts.gate_up_projs.3.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from surgery_formats.storage.base import is_stacked
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.views import expert, rows, transpose, window

__all__ = ["ExpertPath", "ExpertRole", "matrices_of", "parse_expert_path", "part_of", "part_rows"]

ExpertRole = Literal["gate_up_proj", "gate_proj", "up_proj", "down_proj"]
"""A projection of an expert, as transformers calls it."""

_ROLES: Mapping[str, ExpertRole] = {
    "gate_up_proj": "gate_up_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_ROLE = "|".join(_ROLES)
_STACK = re.compile(rf"(?P<stem>.*)\.(?P<home>experts|switch_mlp)\.(?P<role>{_ROLE})(?:\.weight)?")
_SINGLE = re.compile(rf"(?P<stem>.*)\.experts\.(?P<number>\d{{1,5}})\.(?P<role>{_ROLE})\.weight")
_NUMBER = re.compile(r"\.experts\.(\d{1,5})\.")
_LINEARS = re.compile(r"(?P<stem>.*)\.experts\.(?P<role>gate_up_proj|down_proj)s\.(?P<number>\d{1,5})\.weight")


@dataclass(frozen=True, slots=True)
class ExpertPath:
    """A path of experts, taken apart.

    Attributes:
        stem: Path of what holds the module of the experts.
        role: The projection.
        number: Of the expert; None for all of them, stacked.
    """

    stem: str
    role: ExpertRole
    number: int | None = None

    @property
    def stack(self) -> str:
        """Path of the parameter in which transformers has this projection, with its neighbour where they are fused."""
        return f"{self.stem}.experts.{'down_proj' if self.role == 'down_proj' else 'gate_up_proj'}"


def parse_expert_path(path: str) -> ExpertPath | None:
    """The parts of a parameter's path that names experts; None for another."""
    for pattern in (_STACK, _SINGLE, _LINEARS):
        if match := pattern.fullmatch(path):
            found = match.groupdict()
            number = found.get("number")
            return ExpertPath(found["stem"], _ROLES[found["role"]], None if number is None else int(number))
    return None


def part_rows(role: ExpertRole, height: int, *, interleaved: bool) -> range:
    """The rows of the projection `role` in one expert's matrix of `height` rows, of gate and up where it is of both."""
    if role == "gate_proj":
        return range(0, height, 2) if interleaved else range(height // 2)
    if role == "up_proj":
        return range(1, height, 2) if interleaved else range(height // 2, height)
    return range(height)


Matrix = tuple[Parameter, ...]
"""Pieces of one expert's matrix, one below the other, each placed in it by its view's origin."""


def matrices_of(pieces: Sequence[Parameter], *, transposed: bool) -> tuple[Matrix, ...]:
    """The ``(out, in)`` matrix of every expert of a stack; none if the pieces do not tell which expert is whose.

    Args:
        pieces: Of the parameter in the model's code, in order.
        transposed: Whether the model's code has each expert as ``(in, out)``.
    """
    if not pieces:
        return ()
    stack = pieces[0]
    count = stack.sizes[0]
    if len(pieces) == 1:
        if not (is_stacked(stack.storage) and stack.is_whole):
            return ()
        height, width = stack.storage.shape
        turned = transposed != stack.storage.transposed
        views = (expert(number, count, (height // count, width)) for number in range(count))
        return tuple((replace(stack, view=transpose(view) if turned else view),) for view in views)
    if is_stacked(stack.storage) and len(pieces) == count and all(p.storage == stack.storage for p in pieces):
        views = (replace(piece.view, row_origin=0) for piece in pieces)  # an expert each, as the model's code has it
        return tuple((replace(stack, view=transpose(view) if transposed else view),) for view in views)
    if transposed:
        return ()
    if is_stacked(stack.storage) and len(pieces) % count == 0 and all(p.storage == stack.storage for p in pieces):
        each = len(pieces) // count  # gate and up, whose rows alternate on disk alone
        return tuple(_below(pieces[first : first + each]) for first in range(0, len(pieces), each))
    experts: dict[int, list[Parameter]] = {}
    for piece in pieces:
        if (match := _NUMBER.search(piece.name)) is None:
            return ()
        experts.setdefault(int(match[1]), []).append(piece)
    return tuple(_below(experts[number]) for number in sorted(experts))


def _below(pieces: Sequence[Parameter]) -> Matrix:
    """Pieces placed one below the other."""
    origins = accumulate((piece.shape[0] for piece in pieces), initial=0)
    return tuple(
        replace(piece, view=replace(piece.view, row_origin=at)) for piece, at in zip(pieces, origins, strict=False)
    )


def part_of(matrix: Matrix, role: ExpertRole, *, interleaved: bool, origin: int) -> Iterator[Parameter]:
    """The pieces of the projection `role` of one expert's `matrix`, its first row being the row `origin` of a whole."""
    wanted = part_rows(role, sum(piece.shape[0] for piece in matrix), interleaved=interleaved)
    for piece in matrix:
        first, count = piece.view.row_origin, piece.shape[0]
        inside = [row for row in wanted if first <= row < first + count]
        if inside:
            view = rows(replace(piece.view, row_origin=0), inside[0] - first, inside[-1] - first + 1, wanted.step)
            yield replace(piece, view=window(view, row_origin=origin + wanted.index(inside[0])))
