# SPDX-License-Identifier: Apache-2.0
"""What rates say of more workers and larger clusters: the model of scale_out.py, on paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["GB", "Rates", "Site", "Taken", "on_paper", "predicted"]


GB = 1e9


@dataclass(frozen=True)
class Taken:
    """One run.

    Attributes:
        workers: How many.
        shares: Seconds until all shares were there.
        driver: Seconds besides.
        nbytes: Of all shares.
        count: Of shares.
    """

    workers: int
    shares: float
    driver: float
    nbytes: int
    count: int

    @property
    def seconds(self) -> float:
        return self.shares + self.driver


@dataclass(frozen=True)
class Rates:
    """Bytes a second of one worker with all its threads (r: read, a: computed, w: written), and of the disk, by all.

    `computed` is f, the part of the bytes that are.
    """

    read: float
    arithmetic: float
    write: float
    disk: float
    computed: float

    @property
    def of_a_byte(self) -> float:
        return 1 / self.read + self.computed / self.arithmetic + 1 / self.write


def predicted(first: Taken, count: int, plan: float, disk: float) -> float:
    """T(n) of the model that scale_out.py describes, from the run with one worker."""
    share = (first.shares - plan) / first.count
    return plan + max(math.ceil(first.count / count) * share, first.nbytes / disk) + first.driver


@dataclass(frozen=True)
class Site:
    """A cluster on paper: its nodes, their cores and GPUs, bytes a second of a node's network in each direction and of the file system."""

    nodes: int = 16
    cores: int = 64
    gpus: int = 8
    network: float = 12.5 * GB
    files: float = 100 * GB


def on_paper(
    title: str, site: Site, seconds: float, read: float, written: float, driver: float, *, gpus: bool = False
) -> str:
    """The model on a cluster.

    Args:
        title: What is done.
        site: Where.
        seconds: Of one core or GPU, for all shares.
        read: Bytes that workers read.
        written: Bytes that workers write.
        driver: Seconds of the driver.
        gpus: Whether GPUs compute.
    """
    parts = {
        "GPUs" if gpus else "cores": seconds / site.nodes / (site.gpus if gpus else site.cores),
        "network": max(read, written) / site.nodes / site.network,
        "file system": (read + written) / site.files,
    }
    bound = max(parts, key=lambda part: parts[part])
    told = ", ".join(f"{part} {needed:.0f} s" for part, needed in parts.items())
    return (
        f"{title}, {site.nodes} nodes of {site.cores} cores and {site.gpus} GPUs, {site.network / GB:g} GB/s each, "
        f"a file system of {site.files / GB:g} GB/s: "
        f"{parts[bound]:.0f} s of shares, bound by the {bound} ({told}), and {driver:.0f} s of the driver"
    )
