# SPDX-License-Identifier: Apache-2.0
"""Conservation of an adapter's tensors: each is used by an update, or ignored with a reason."""

from __future__ import annotations

from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.text import listing

__all__ = ["check_consumed"]


def check_consumed(adapter: Adapter, error: type[FitError | ProofError] = FitError) -> None:
    """Refuse an adapter with tensors that no update uses.

    Args:
        adapter: The adapter to check.
        error: The error to raise: `ProofError` for an adapter that was just written.

    Raises:
        FitError: tensors are left over (or `error`).
    """
    if left := adapter.unconsumed():
        apart = left[0].path not in {tensor.path for tensor in adapter.tensors if tensor not in left}
        apart = apart and len(left) < len(adapter.tensors)
        raise error(
            f"{len(left)} of {len(adapter.tensors)} tensors are not used by any update: "
            f"{listing(tensor.name for tensor in left)}",
            file=left[0].path if error is FitError else adapter.path.name,
            tensor=left[0].name,
            hint="no rule knows this file: move it out of the adapter's folder if it is no part of it"
            if apart
            else None,
        )
