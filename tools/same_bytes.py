# SPDX-License-Identifier: Apache-2.0
"""Whether two checkouts write the same bytes: 30 jobs of the command ``surgery`` on the same inputs, every output compared.

``python tools/same_bytes.py --before OLD --after NEW``; or once ``--before OLD --record hashes.json``, and then
``--against hashes.json --after NEW``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from same_bytes_child import search_path
from same_bytes_inputs import write_inputs
from same_bytes_jobs import JOBS, Job

__all__ = ["main"]

SHOWN = 3  # keys or tensors of a file that are named
SHOWN_FILES = 8
CHILD = Path(__file__).with_name("same_bytes_child.py")


class NotRunnableError(Exception):
    """The entry point of a checkout cannot be imported, or is another checkout's."""


@dataclass
class Written:
    """What one job left.

    Attributes:
        files: sha256 and size by name; an empty folder ends with ``/``.
        faults: Commands that did not end as the job says.
        seconds: All its commands together.
        folder: Where the files are; None where only their hashes are known.
    """

    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    folder: Path | None = None


# --- running ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leave:
    """What of manifests is not compared.

    Attributes:
        old_plans: The plan of an export. Older checkouts wrote the resume id there, a digest of inodes and modification
            times, so that copies of the inputs gave other bytes. Such a checkout can be compared only without this value.
        keys: Keys that one of the checkouts has on purpose and the other lacks.
    """

    old_plans: bool = False
    keys: tuple[str, ...] = ()


def run_jobs(checkout: Path, jobs: Sequence[Job], place: Path, leave: Leave) -> dict[str, Written]:
    """Run the jobs with the code of `checkout` in `place`, which holds the inputs."""
    logs = place / "logs"
    commands, owners = [], []
    for job in jobs:
        out = Path("out") / job.name
        (place / out).mkdir(parents=True)
        (logs / job.name).mkdir(parents=True)
        for i, line in enumerate(job.commands):
            words = [word.replace("OUT", str(out)) for word in shlex.split(line)]
            stdout = out / f"stdout-{i}.txt" if job.stdout else logs / job.name / f"{i}.stdout"
            commands.append({"words": words, "stdout": str(stdout), "stderr": str(logs / job.name / f"{i}.stderr")})
            owners.append((job, line, logs / job.name / f"{i}.stderr"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search_path(checkout)),
        "PYTHONPYCACHEPREFIX": str(place / "pycache"),  # the checkout is left as it is
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",  # of what is printed
    }
    child = subprocess.run(
        [sys.executable, str(CHILD), str(checkout)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=False,
    )
    if child.returncode:
        raise NotRunnableError(f"{checkout}: its command cannot be run\n{child.stderr}")
    written = {job.name: Written(folder=place / "out" / job.name) for job in jobs}
    for (job, line, stderr), ended in zip(owners, json.loads(child.stdout), strict=True):
        written[job.name].seconds += ended["seconds"]
        if fault := _fault(job, ended["code"], stderr.read_text(errors="replace")):
            written[job.name].faults.append(f"surgery {line}: {fault}")
    for job in jobs:
        written[job.name].files = dict(_hashes(place / "out" / job.name, leave))
        if bool(written[job.name].files) == bool(job.code):
            written[job.name].faults.append("something was written" if job.code else "nothing was written")
    return written


def _fault(job: Job, code: int, stderr: str) -> str:
    """Why a command did not end as it must; empty if it did."""
    if code != job.code:
        last = [line for line in stderr.splitlines() if line.strip()][-3:]
        return f"exit code {code}, not {job.code}: {' / '.join(last)}"
    if job.error:
        reported = [json.loads(line)["error"]["code"] for line in stderr.splitlines() if line.startswith("{")]
        if reported != [job.error]:
            return f"error {reported}, not {job.error}"
    return ""


def _hashes(folder: Path, leave: Leave = Leave()) -> Iterator[tuple[str, tuple[str, int]]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield name, (f"link to {path.readlink()}", 0)
        elif path.is_file():
            data = _content(path, leave)
            yield name, (hashlib.sha256(data).hexdigest(), len(data))
        elif not any(path.iterdir()):
            yield f"{name}/", ("empty folder", 0)


def _content(path: Path, leave: Leave) -> bytes:
    """The bytes of a file that are compared: of a manifest without what is left out."""
    data = path.read_bytes()
    if path.name != "surgery_manifest.json":
        return data
    if leave.old_plans and b'\n "export": {' in data:
        data = re.sub(rb'(\n "plan": )"[0-9a-f]{64}"', rb'\1"(not compared)"', data)
    manifest = _parsed(data)
    if isinstance(manifest, dict) and any(key in manifest for key in leave.keys) and _as_written(manifest) == data:
        data = _as_written({key: value for key, value in manifest.items() if key not in leave.keys})
    return data


def _as_written(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest: a file that differs from them in its layout is compared as it is."""
    return json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"


# --- comparing ----------------------------------------------------------------------------------------------------------


def differences(before: Written, after: Written) -> list[str]:
    """What differs between two runs of a job, a line for each file."""
    found = []
    for name in sorted(before.files.keys() | after.files.keys()):
        if name not in after.files or name not in before.files:
            found.append(f"{name}: only {'before' if name in before.files else 'after'}")
        elif before.files[name] != after.files[name]:
            sizes = f"{before.files[name][1]} and {after.files[name][1]} bytes"
            found.append(f"{name}: {sizes}{_where(before, after, name)}")
    return found


def _where(before: Written, after: Written, name: str) -> str:
    if before.folder is None or after.folder is None or name.endswith("/"):
        return ""
    one, two = (written.folder / name for written in (before, after) if written.folder)
    if one.is_symlink() or two.is_symlink():
        return f"; {before.files[name][0]}, {after.files[name][0]}"
    a, b = one.read_bytes(), two.read_bytes()
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    text = f"; first at byte {same}"
    if name.endswith(".json"):
        text += _listed("keys", _changed(_flat(_parsed(a)), _flat(_parsed(b))))
    if name.endswith(".safetensors"):
        text += _listed("tensors", _changed(_tensors(a), _tensors(b), values=False))
    return text


def _listed(what: str, items: Sequence[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"; {what} {', '.join(items[:SHOWN])}{more}" if items else ""


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], *, values: bool = True) -> list[str]:
    keys = [key for key in (*a, *(k for k in b if k not in a)) if a.get(key, ...) != b.get(key, ...)]
    if not values:
        return keys
    return [f"{key} ({a.get(key, 'missing')!s:.24} -> {b.get(key, 'missing')!s:.24})" for key in keys]


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {at: value}
    return {key: leaf for name, inner in items for key, leaf in _flat(inner, f"{at}/{name}").items()}


def _tensors(data: bytes) -> dict[str, Any]:
    """Type, shape and bytes of each tensor of a safetensors file, and its metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = _parsed(data[8:start])
    if not isinstance(header, dict):
        return {}
    found = {"__metadata__": header.pop("__metadata__", None)}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], data[start + low : start + high])
    return found


# --- the script ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run, compare, show; 1 if anything differs or did not end as it must, 2 if nothing could be compared."""
    options = _options()
    jobs = [job for job in JOBS if not options.only or options.only in job.name]
    if not jobs:
        return _refuse(f"no job is called {options.only}: {', '.join(job.name for job in JOBS)}")
    try:
        if options.keep:
            options.keep.mkdir(parents=True)
            return _compare(options, jobs, options.keep.resolve())
        with tempfile.TemporaryDirectory(prefix="same-bytes-") as folder:
            return _compare(options, jobs, Path(folder).resolve())
    except NotRunnableError as error:
        return _refuse(str(error))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    old = parser.add_mutually_exclusive_group(required=True)
    old.add_argument(
        "--before", type=Path, metavar="DIR", help="the checkout to compare with; inputs are taken from it"
    )
    old.add_argument(
        "--against", type=Path, metavar="FILE", help="what --record wrote, instead; inputs come from --after"
    )
    parser.add_argument("--after", type=Path, metavar="DIR", help="the checkout to judge")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the hashes of --before's outputs")
    parser.add_argument("--only", metavar="NAME", help="jobs whose name holds NAME")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder, where inputs and outputs stay")
    parser.add_argument(
        "--old-plans",
        action="store_true",
        help="ignore the plan in manifests of exports, which used to depend on inodes",
    )
    parser.add_argument(
        "--new-keys",
        nargs="+",
        default=(),
        metavar="KEY",
        help="keys of manifests that one of the checkouts has on purpose: manifests are compared without them",
    )
    options = parser.parse_args()
    if not (options.after or options.record) or (options.record and not options.before):
        parser.error("--after is missing" if not options.record else "--record needs --before")
    return options


def _compare(options: argparse.Namespace, jobs: Sequence[Job], folder: Path) -> int:
    """Both checkouts at once, each in a copy of the inputs."""
    start = time.monotonic()
    checkouts = {name: path.resolve() for name in ("before", "after") if (path := getattr(options, name))}
    first, *others = checkouts
    write_inputs(checkouts[first], folder / first)
    inputs = hashlib.sha256(json.dumps(dict(_hashes(folder / first))).encode()).hexdigest()
    for other in others:
        shutil.copytree(folder / first, folder / other)
    leave = Leave(options.old_plans, tuple(options.new_keys))
    lanes = 1 if others else 2  # two processes work at a time
    with ThreadPoolExecutor(2) as pool:
        runs = [
            (name, pool.submit(run_jobs, path, jobs[lane::lanes], folder / name, leave))
            for name, path in checkouts.items()
            for lane in range(min(lanes, len(jobs)))
        ]
    done: dict[str, dict[str, Written]] = {name: {} for name in checkouts}
    for name, run in runs:
        done[name] |= run.result()
    if options.record:
        written = {job.name: done["before"][job.name] for job in jobs}
        record = {"inputs": inputs, "jobs": {n: {"files": w.files, "faults": w.faults} for n, w in written.items()}}
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    if options.against:
        record = json.loads(options.against.read_text())
        if record["inputs"] != inputs:
            return _refuse(f"{options.against}: recorded with other inputs; record again, or compare with --before")
        if missing := [job.name for job in jobs if job.name not in record["jobs"]]:
            return _refuse(f"{options.against}: no job {', '.join(missing)}; record again")
        done["before"] = {
            n: Written({k: tuple(v) for k, v in w["files"].items()}, w["faults"]) for n, w in record["jobs"].items()
        }
    bad = _show(jobs, done)
    _say(f"{len(jobs)} jobs in {time.monotonic() - start:.0f} s: {f'{bad} bad' if bad else 'all good'}")
    return 1 if bad else 0


def _show(jobs: Sequence[Job], done: Mapping[str, Mapping[str, Written]]) -> int:
    """The table; returns how many jobs differ or did not end as they must."""
    bad = 0
    width = max(len(job.name) for job in jobs)
    _say(f"{'job':{width}}  files      bytes  seconds  outputs")
    for job in jobs:
        runs = {name: written[job.name] for name, written in done.items()}
        newest = runs.get("after") or runs["before"]
        changed = differences(runs["before"], runs["after"]) if "after" in runs else []
        lines = [f"{name}: {fault}" for name in sorted(runs, reverse=True) for fault in runs[name].faults]
        verdict = "faulty" if lines else "differ" if changed else "same" if "after" in runs else "recorded"
        lines += changed[:SHOWN_FILES]
        if more := changed[SHOWN_FILES:]:
            lines.append(f"and {len(more)} more files")
        size = sum(size for _, size in newest.files.values())
        _say(f"{job.name:{width}}  {len(newest.files):5}  {size:9,}  {newest.seconds:7.1f}  {verdict}")
        for line in lines:
            _say(f"    {line}")
        bad += bool(lines)
    return bad


def _refuse(why: str) -> int:
    _say(why)
    return 2


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
