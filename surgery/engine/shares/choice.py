# SPDX-License-Identifier: Apache-2.0
"""The engine that a user named."""

from __future__ import annotations

from surgery.engine.shares.work import Cluster, EngineLike
from surgery_formats.errors import UsageError
from surgery_formats.text import show

__all__ = ["cluster_of", "device_of_workers"]


def cluster_of(engine: EngineLike | None) -> Cluster | None:
    """The cluster that `engine` names; None where this process does all of it.

    Raises:
        UsageError: no engine has this name.
    """
    if engine is None or engine == "local":
        return None
    if not isinstance(engine, str):
        return engine
    name, _, address = engine.partition(":")
    if name != "ray":
        raise UsageError(f"'{show(engine, 60)}' is no engine", hint="there are local, ray and ray:HOST:PORT")
    from surgery.engine.shares.ray import Ray

    return Ray(address)


def device_of_workers(device: str) -> str:
    """Where a worker computes: ``cpu``, or ``cuda``, whichever GPU it is given; ``auto`` is the cpu, as for a merge.

    Raises:
        UsageError: the name of a GPU of this machine.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise UsageError(
            f"'{show(device, 40)}' is a device of this machine, and workers get theirs from the cluster",
            hint="`device=cuda`: a GPU for each share",
        )
    return "cuda" if device == "cuda" else "cpu"
