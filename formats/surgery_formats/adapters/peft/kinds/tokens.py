# SPDX-License-Identifier: Apache-2.0
"""Trained rows of an embedding, beside the factors of LORA and ADALORA or alone (PEFT 0.21, ``tuners/trainable_tokens``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, TokenRows, Update, same_update

__all__ = ["ROWS", "check_copies", "put_rows", "read_rows"]

ROWS = "trainable_tokens_delta"


def read_rows(path: str, tensor: StoredTensor, config: PeftConfig) -> TokenRows:
    """The rows of the module `path`.

    PEFT also writes those of a layer that is tied to the one that the configuration names, once the vocabulary was
    resized or with ``ensure_weight_tying``: they are of the same tokens (peft#2898).

    Raises:
        MalformedError: the configuration has another number of token ids for it.
    """
    indices = config.token_indices
    if isinstance(indices, Mapping):
        named = [rows for name, rows in indices.items() if _names(name, path)]
        if not named and len(indices) == 1:
            named = list(indices.values())
        indices = named[0] if len(named) == 1 else ()
    if len(tensor.shape) != 2 or len(indices) != tensor.shape[0]:
        raise MalformedError(
            f"{tensor.shape[0] if tensor.shape else 0} token rows for {len(indices)} indices",
            file=tensor.file.path,
            tensor=tensor.name,
        )
    return TokenRows(Factor.of(tensor), indices)


def check_copies(updates: Mapping[Site, Sequence[Update]], config: PeftConfig) -> None:
    """Compare the rows of a layer that the configuration does not name with those of the layer that it is tied to.

    Where the file has no rows of the named one, all that it has are copies of them.

    Raises:
        MalformedError: they differ.
    """
    indices = config.token_indices
    if not isinstance(indices, Mapping) or len(indices) != 1:
        return
    name = next(iter(indices))
    rows = {site.path: one for site, chain in updates.items() for one in chain if isinstance(one, TokenRows)}
    named = [path for path in rows if _names(name, path.removesuffix(".weight"))]
    named = named or [*rows][:1]
    for path in rows:
        if path not in named and len(named) == 1 and not same_update(rows[path], rows[named[0]]):
            raise MalformedError(
                f"its rows differ from those of '{named[0]}', and the configuration names tokens of '{name}' alone",
                file=config.file,
                tensor=path,
            )


def _names(name: str, path: str) -> bool:
    return f".{path}".endswith(f".{name}")


def put_rows(file: PeftFile, site: Site, rows: TokenRows) -> None:
    """Store rows and their ids."""
    module = site.path.removesuffix(".weight")
    wrapper = "" if file.own is not None and file.own.kind == "TRAINABLE_TOKENS" else ".token_adapter"
    file.put(f"{file.prefix}{module}{wrapper}.{ROWS}", rows.value)
    file.rows[module] = rows.indices
    file.targets.discard(module)
    file.ledger.keep(site, rows, "exact", "trainable tokens")
