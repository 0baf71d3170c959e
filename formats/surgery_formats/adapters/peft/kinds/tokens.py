# SPDX-License-Identifier: Apache-2.0
"""Trained rows of an embedding, beside the factors of LORA and ADALORA or alone (PEFT 0.21, ``tuners/trainable_tokens``)."""

from __future__ import annotations

from collections.abc import Mapping

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, TokenRows

__all__ = ["ROWS", "put_rows", "read_rows"]

ROWS = "trainable_tokens_delta"


def read_rows(path: str, tensor: StoredTensor, config: PeftConfig) -> TokenRows:
    """The rows of the module `path`.

    Raises:
        MalformedError: the configuration has another number of token ids for it.
    """
    indices = config.token_indices
    if isinstance(indices, Mapping):
        named = [rows for name, rows in indices.items() if f".{path}".endswith(f".{name}")]
        indices = named[0] if len(named) == 1 else ()
    if len(tensor.shape) != 2 or len(indices) != tensor.shape[0]:
        raise MalformedError(
            f"{tensor.shape[0] if tensor.shape else 0} token rows for {len(indices)} indices",
            file=tensor.file.path,
            tensor=tensor.name,
        )
    return TokenRows(Factor.of(tensor), indices)


def put_rows(file: PeftFile, site: Site, rows: TokenRows) -> None:
    """Store rows and their ids."""
    module = site.path.removesuffix(".weight")
    wrapper = "" if file.own is not None and file.own.kind == "TRAINABLE_TOKENS" else ".token_adapter"
    file.put(f"{file.prefix}{module}{wrapper}.{ROWS}", rows.value)
    file.rows[module] = rows.indices
    file.targets.discard(module)
    file.ledger.keep(site, rows, "exact", "trainable tokens")
