# SPDX-License-Identifier: Apache-2.0
"""The plan of a rebuilt checkpoint: its weight files are ranges of the base's, which the kernel copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery._version import __version__
from surgery.engine.layout import lay_out
from surgery.engine.plan import Account, Copy, Plan, PlannedFile, PlannedTensor, SideFile
from surgery.engine.quantised.output import QuantisedOutput
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.bounded_json import json_bytes
from surgery_formats.files.raw import open_file
from surgery_formats.models.identity import fingerprint
from surgery_formats.models.rebuilt.rebuilt import Rebuilt
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, without_local_paths

__all__ = ["plan_rebuilt", "rebuilt_facts"]

_CODES_STAY = QuantisedOutput(only_touched=True)  # and here nothing is touched


def plan_rebuilt(rebuilt: Rebuilt, dtype: DType | None = None, shard_size: int | None = None) -> Plan:
    """The plan that writes `rebuilt`; reads headers only.

    Args:
        rebuilt: What to write.
        dtype: Store every floating-point weight in this type; None keeps each as it is stored.
        shard_size: Most bytes per file; None keeps the base's shards.

    Raises:
        FitError: a tensor of the base would end nowhere; a type for weights that are stored as codes.
    """
    component = rebuilt.checkpoint.main
    if dtype is not None and component.is_quantised:
        raise FitError(
            f"its weights are stored as codes, and not as {dtype.label} numbers in another type",
            file=rebuilt.base.path,
            hint="leave out `dtype=`: codes are copied as they are",
        )
    layout = lay_out(component, {}, dtype, shard_size, quantised=_CODES_STAY)
    files = tuple(_told(file, rebuilt) for file in layout.files)
    accounts = [*(Account(gone.tensor, "dropped", gone.why) for gone in rebuilt.dropped), *layout.accounts]
    _check_conservation(rebuilt, files, accounts)
    side_files = [SideFile(layout.index_name, data=layout.index)] if layout.index_name else []
    for name, path in rebuilt.checkpoint.side_files:
        data = rebuilt.side_files.get(name)
        side_files.append(SideFile(name, source=path) if data is None else SideFile(name, data=data))
    side_files += _config(rebuilt, dtype)
    facts = rebuilt_facts(rebuilt)
    options = {"dtype": dtype.label if dtype else "keep", "shard_size": shard_size}
    return Plan(
        verb="layers",
        files=files,
        side_files=tuple(side_files),
        accounts=tuple(accounts),
        ignored=(),
        inputs=tuple(shard.file for shard in rebuilt.base.main.shards),
        roots=(rebuilt.base.path,),
        id=hashlib.sha256(json.dumps([__version__, "layers", facts, options], sort_keys=True).encode()).hexdigest(),
        facts=facts,
        warnings=(*rebuilt.warnings, *_left_behind(rebuilt)),
    )


def rebuilt_facts(rebuilt: Rebuilt) -> dict[str, Any]:
    """What identifies the base by its content, and what was made of it."""
    base = rebuilt.base
    return {
        "base": {shard.path.name: fingerprint(shard.file) for shard in base.main.shards},
        "side_files": {name: fingerprint(open_file(path)) for name, path in base.side_files},
        "configs": {"": without_local_paths(base.main.config)},
        **rebuilt.facts,
    }


def _told(file: PlannedFile, rebuilt: Rebuilt) -> PlannedFile:
    """Each tensor with the tensor of the base that it is, for the ledger."""
    return replace(file, tensors=tuple(_from_base(tensor, rebuilt.origins[tensor.name]) for tensor in file.tensors))


def _from_base(tensor: PlannedTensor, origins: Sequence[StoredTensor]) -> PlannedTensor:
    if not isinstance(tensor.step, Copy):
        return tensor
    source, first = tensor.step.source, origins[0]
    if len(origins) == 1 and (source.dtype, source.shape) == (first.dtype, first.shape) and _same_bytes(source, first):
        return replace(tensor, step=replace(tensor.step, source=first))
    return replace(tensor, outcome="moved")


def _same_bytes(tensor: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are one range of a file."""
    ranges = list(tensor.file.ranges(tensor.offset, tensor.nbytes))
    return ranges == list(other.file.ranges(other.offset, other.nbytes)) and tensor.strides == other.strides


def _check_conservation(rebuilt: Rebuilt, files: Sequence[PlannedFile], accounts: Sequence[Account]) -> None:
    used = {id(origin) for file in files for tensor in file.tensors for origin in rebuilt.origins[tensor.name]}
    used |= {id(account.tensor) for account in accounts}
    used |= {id(one) for account in accounts for one in rebuilt.origins.get(account.tensor.name, ())}
    lost = [tensor for tensor in rebuilt.base.main.tensors.values() if id(tensor) not in used]
    if lost:
        raise FitError(
            f"{len(lost)} tensors would end nowhere: {listing(tensor.name for tensor in lost)}",
            file=lost[0].path,
            tensor=lost[0].name,
        )


def _config(rebuilt: Rebuilt, dtype: DType | None) -> list[SideFile]:
    component = rebuilt.checkpoint.main
    if not component.config:
        return []
    config: Mapping[str, Any] = component.config
    if dtype is not None:
        config = {**config, **{key: dtype.torch_name for key in ("dtype", "torch_dtype") if key in config}}
    if config == rebuilt.base.main.config and (own := component.folder / "config.json").exists():
        return [SideFile("config.json", source=own)]
    return [SideFile("config.json", data=json_bytes(config))]


def _left_behind(rebuilt: Rebuilt) -> tuple[str, ...]:
    left = rebuilt.checkpoint.left_behind
    if not left:
        return ()
    return (f"not carried (other weights, deeper folders, links out of the folder): {listing(left)}",)
