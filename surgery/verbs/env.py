# SPDX-License-Identifier: Apache-2.0
"""Environment: what a bug report needs to say about the machine, and what is wrong with the installation.

Versions are read from the packages' metadata; nothing is imported unless a deep look is asked for.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from surgery._version import __version__
from surgery.onnx.run.runtime import clash_cure, installed_runtimes
from surgery.reports.result import elapsed, summarised, timed
from surgery.reports.sections import Facts, Note
from surgery.reports.summary import Summary
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.extras import EXTRAS, install_line
from surgery_formats.text import numbered
from surgery_formats.threads import cores

__all__ = ["EnvironmentReport", "Finding", "Gpu", "Package", "env"]

REQUIRED = ("click", "ml_dtypes", "numpy", "regex", "rich", "safetensors", "xxhash")
PEERS = ("transformers", "peft", "diffusers", "onnx-ir")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
_SMI_SECONDS = 10.0
_MIB = 1 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution by the name it is installed by; no version means it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device, as the driver tells.

    Attributes:
        name: Of the product.
        driver: Version of the driver.
        nbytes: Of its memory.
    """

    name: str
    driver: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with the installation.

    Attributes:
        what: What is wrong.
        cure: Commands, or what to do.
    """

    what: str
    cure: str


@summarised
@dataclass(frozen=True)
class EnvironmentReport:
    """The machine and the installation.

    Attributes:
        version: Of surgery.
        python: Version of Python, with its implementation where that is not CPython.
        platform: Operating system and machine.
        packages: What is required, then every onnxruntime found (or its absence), then those of extras, then peers.
        gpus: CUDA devices that the driver shows; none without a driver.
        cores: Cores this process may use.
        memory_nbytes: Memory this process may use: of the machine, or of its container; None where it cannot be told.
        findings: What is wrong.
        deep: From importing torch and onnxruntime, where that was asked for: devices they can use, or how they fail.
        seconds: How long it took.
    """

    version: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    gpus: tuple[Gpu, ...]
    cores: int
    memory_nbytes: int | None
    findings: tuple[Finding, ...]
    deep: Mapping[str, str] = field(default_factory=dict)
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # no files were looked at

    @property
    def warnings(self) -> tuple[str, ...]:
        """The findings, each with its remedy."""
        return tuple(f"{finding.what}; {finding.cure}" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"type": "environment", **plain(self)}

    def summary(self, *, verbose: bool = False) -> Summary:
        """Versions and devices; what is wrong as warnings."""
        memory: Phrase = f"{self.cores} cores"
        if self.memory_nbytes is not None:
            memory = f"{self.cores} cores, ", Value(self.memory_nbytes, "bytes"), " of memory"
        gpus = (
            ("gpu", (Name(gpu.name), ", ", Value(gpu.nbytes, "bytes"), ", driver ", Name(gpu.driver)))
            for gpu in self.gpus
        )
        facts: tuple[tuple[Phrase, Phrase], ...] = (
            ("surgery", self.version),
            ("python", self.python),
            ("platform", Name(self.platform)),
            ("machine", memory),
            *gpus,
            *((package.name, package.version or _absent(package.name)) for package in self.packages),
            *((f"{name} says", text) for name, text in self.deep.items()),
        )
        warnings = (Note(f"{finding.what}; cure: {finding.cure}", "warning") for finding in self.findings)
        return Summary("Environment", (Facts(facts), *warnings))


@timed
def env(*, deep: bool = False) -> EnvironmentReport:
    """Look at the machine and the installation.

    Args:
        deep: Import torch and onnxruntime too, to see what they can use (slow).
    """
    required = tuple(Package(name, _version(name)) for name in REQUIRED)
    runtimes = tuple(Package(name, version) for name, version in installed_runtimes().items())
    optional = tuple(Package(name, _version(name)) for name in (*EXTRAS, *PEERS) if name != "onnxruntime")
    gpus = _gpus()
    implementation = platform.python_implementation()
    return EnvironmentReport(
        version=__version__,
        python=platform.python_version() + ("" if implementation == "CPython" else f" ({implementation})"),
        platform=f"{platform.platform()} ({platform.machine()})",
        packages=(*required, *(runtimes or (Package("onnxruntime", None),)), *optional),
        gpus=gpus,
        cores=cores(),
        memory_nbytes=_memory(),
        findings=tuple(_findings(required, runtimes, gpus)),
        deep=_deep() if deep else {},
    )


def _absent(name: str) -> str:
    return f"not installed: {install_line(EXTRAS[name])}" if name in EXTRAS else "not installed"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none if it is missing or its driver does not answer."""
    try:
        answer = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 2)]
        if len(cells) == 3 and cells[0]:
            gpus.append(Gpu(cells[0], cells[1], int(cells[2]) * _MIB if cells[2].isdecimal() else 0))
    return tuple(gpus)


def _memory() -> int | None:
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
    for name in _CGROUP_LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)


def _findings(required: tuple[Package, ...], runtimes: tuple[Package, ...], gpus: tuple[Gpu, ...]) -> list[Finding]:
    findings = []
    if missing := [package.name for package in required if package.version is None]:
        findings.append(Finding(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}"))
    if len(runtimes) > 1:
        names = [package.name for package in runtimes]
        findings.append(
            Finding(
                f"{' and '.join(names)} are both installed: they write the same files, what `import onnxruntime` gives "
                "depends on which came last",
                clash_cure(names),
            )
        )
    torch = _version("torch")
    if gpus and torch and "+cpu" in torch:
        findings.append(
            Finding(f"a GPU is here, but torch {torch} is built without CUDA", "install torch from a CUDA index")
        )
    return findings


def _deep() -> dict[str, str]:
    descriptions = {}
    for name, look in (("torch", _look_at_torch), ("onnxruntime", _look_at_onnxruntime)):
        try:
            descriptions[name] = look(importlib.import_module(name))
        except Exception as error:  # the point of looking: a broken installation raises anything
            descriptions[name] = f"cannot be used: {type(error).__name__}: {error}"
    return descriptions


def _look_at_torch(torch: Any) -> str:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    threads = torch.get_num_threads()
    counts = f"{numbered(devices, 'device')}, {numbered(threads, 'thread')}"
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {counts}"


def _look_at_onnxruntime(onnxruntime: Any) -> str:
    return f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"
