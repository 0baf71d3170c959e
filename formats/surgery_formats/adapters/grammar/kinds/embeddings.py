# SPDX-License-Identifier: Apache-2.0
"""``bundle_emb.TOKEN.clip_l``: token embeddings beside a LoRA (OneTrainer, A1111), shown and kept out of weights.

``clip_l_out`` are OneTrainer's vectors in place of what the encoder gives for the token.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import Factor, Unmerged, Update

__all__ = ["EMBEDDINGS"]

_KINDS = {"embedding": ("weight", "token embedding"), "embedding_out": ("output", "output embedding")}
_WHY = "rows for a new token, which the base's tokenizer does not know: no weight of it can be asked for them"


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    for role, (parameter, kind) in _KINDS.items():
        if (stored := module.parts.get(role)) is None:
            continue
        if len(stored.shape) not in (1, 2) or not stored.dtype.is_float_or_fp8:
            raise malformed(stored, f"{list(stored.shape)}, not rows of an embedding")
        shape = (1, stored.numel) if len(stored.shape) == 1 else (stored.shape[0], stored.shape[1])
        instead = f"leave it out, and give it to the prompt from its own file: without='*{module.path}*'"
        yield ReadUpdate(parameter, Unmerged(kind, (("rows", Factor((stored,), shape)),), _WHY, instead, shape))


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    assert isinstance(update, Unmerged)  # as `writes` says
    ((_, rows),) = update.held
    writer.put(next(role for role, (name, _) in _KINDS.items() if name == parameter), rows, rows.tensors[0].shape)


EMBEDDINGS = LeafKind(
    name="a token embedding",
    roles=frozenset(_KINDS),
    marks=frozenset(_KINDS),
    read=_read,
    writes=frozenset(kind for _, kind in _KINDS.values()),
    write=_write,
    takes=lambda _: False,  # of another file it is a textual inversion
)
