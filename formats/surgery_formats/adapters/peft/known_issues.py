# SPDX-License-Identifier: Apache-2.0
"""Signs in a PEFT folder that its scale is not the one that was meant.

``add_weighted_adapter`` gives its result ``lora_alpha = r`` and no patterns. Two of its versions made that wrong:

    before 0.21        the combinations by SVD multiply each source's ``alpha / r`` in twice
    0.21 too, rsLoRA   ``use_rslora`` is copied from the first source, which scales the result by ``sqrt(r)``
                       (huggingface/peft#3449)

torchtune exports to PEFT with a configuration of four or five fields. It puts rows of queries and keys in another order for
every family, though its Qwen2 has them as transformers does, and leaves the magnitudes of a DoRA in its own order (torchtune
0.6.1, ``models/convert_weights.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

if TYPE_CHECKING:
    import numpy as np

__all__ = ["combination_issues", "issues_by_value", "torchtune_issues", "untrue_export"]

_TORCHTUNE = {"r", "lora_alpha", "target_modules", "peft_type"}
_PAIRED = re.compile(r"\.[qk]_proj\.lora_B\.weight$")
_FIXED = (0, 21)
_RSLORA = (0, 21)  # the newest that does so
_LARGEST = 1 << 24  # elements of the one factor that is looked at
_ORTHONORMAL = 0.02  # greatest error of A A^T: bfloat16 rounds each of its sums by less


def combination_issues(config: Mapping[str, Any]) -> Iterable[str]:
    """Whether a combination by ``add_weighted_adapter`` may be scaled wrongly, by its configuration."""
    if config.get("use_rslora") is True and _like_combined(config) and _version(config) <= _RSLORA:
        times = math.sqrt(config["r"])
        yield (
            f"rsLoRA with lora_alpha = r: where PEFT's add_weighted_adapter made it, "
            f"it acts {times:.3g} times too strongly "
            f"(if so, combine it alone with weight {1 / times:.3g}); where it was trained like this, all is well"
        )


def torchtune_issues(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> Iterable[str]:
    """Whether rows may lie in a wrong order because torchtune exported them.

    Plain configurations are not only torchtune's: its own file lies beside, or the base is said to be a Qwen.
    """
    if set(config) - {"base_model_name_or_path"} != _TORCHTUNE or not any(map(_PAIRED.search, names)):
        return
    named = "qwen" in str(config.get("base_model_name_or_path", "")).lower()
    if named or (path / "adapter_model.pt").exists():
        where = "its base is a Qwen: rows" if named else "where its base is a Qwen2, rows"
        yield (
            f"it looks like an export of torchtune's; {where} of q_proj and k_proj are in a wrong order, "
            "and adapter_model.pt beside it has them right"
        )


def untrue_export(config: Mapping[str, Any]) -> str | None:
    """What to do about a DoRA whose configuration does not know that it is one; None if torchtune did not export it."""
    if set(config) - {"base_model_name_or_path"} != _TORCHTUNE:
        return None
    return (
        "torchtune's exports do not say it, and have the magnitudes of queries and keys in another order than their rows: "
        "name adapter_model.pt beside it, which is right"
    )


def issues_by_value(kind: str, config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> tuple[str, ...]:
    """Issues that only values show. Reads one factor with numpy, and only of files that may be affected."""
    if kind != "LORA" or not _like_combined(config) or _version(config) >= _FIXED:
        return ()
    factors = [t for t in tensors if t.name.endswith(".lora_A.weight") and 1 < t.shape[0] <= t.matrix[1]]
    smallest = min(factors, key=lambda tensor: (tensor.numel, tensor.name), default=None)
    if smallest is None or smallest.numel > _LARGEST or (values := _values(smallest)) is None:
        return ()
    if not _orthonormal(values):
        return ()
    return (
        f"'{show(smallest.name)}' has orthonormal rows and lora_alpha = r, as PEFT's combinations by SVD leave them: "
        "before PEFT 0.21 these multiplied the alpha / r of every source in twice. "
        "Right only if alpha was r in all of them; else combine the originals",
    )


def _like_combined(config: Mapping[str, Any]) -> bool:
    rank = config.get("r")
    plain = not config.get("rank_pattern") and not config.get("alpha_pattern")
    return isinstance(rank, int) and rank > 1 and config.get("lora_alpha") == rank and plain


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Of PEFT, which writes it since 0.18."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("peft_version") or "0.0"))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _values(tensor: StoredTensor) -> np.ndarray[Any, Any] | None:
    """Rows as float32; None for other types than a LoRA has."""
    return cast(tensor.read(), DType.F32).reshape(tensor.matrix) if tensor.dtype.is_float else None


def _orthonormal(rows: np.ndarray[Any, Any]) -> bool:
    import numpy as np

    with np.errstate(
        all="ignore"
    ):  # NaN and Inf are no orthonormal rows, and whoever reads all values refuses them by name
        return bool(abs(rows @ rows.T - np.eye(len(rows), dtype=np.float32)).max() <= _ORTHONORMAL)
