# SPDX-License-Identifier: Apache-2.0
"""Feed damaged files to every reader of adapters and every container: each is read, or refused with a `SurgeryError`.

    python tools/fuzz_readers.py --executions 1000000 --workers 16 --seed 0
    python tools/fuzz_readers.py --only 31337 --seed 0 --keep DIR    # one of them again, its files kept

An execution damages one of `fuzz_seeds.seeds` (`fuzz_mutations`), reads it, and asks what was read all that commands ask. It must
end within `LIMIT` seconds and `MEMORY` bytes. Which files it gets depends on the seed and its number alone. Needs no more than
numpy, ml_dtypes, regex and what they need; files lie in memory (/dev/shm) where there is such a place.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

__all__ = ["Fault", "Fuzzer", "main", "read"]

LIMIT = 10.0
MEMORY = 3 << 30
STUCK = 60.0  # seconds after which a worker that does not even hear the alarm is killed
KEPT = 5  # inputs of one fault


def _stand_in() -> None:
    """Digests and limits of threads, which readers import and do not need, where their packages are not installed."""
    made: Any
    if importlib.util.find_spec("xxhash") is None:
        import hashlib

        made = types.ModuleType("xxhash")
        made.xxh3_128 = lambda data=b"": hashlib.blake2b(data, digest_size=16)
        made.xxh3_128_hexdigest = lambda data: hashlib.blake2b(data, digest_size=16).hexdigest()
        sys.modules["xxhash"] = made
    if importlib.util.find_spec("threadpoolctl") is None:
        made = types.ModuleType("threadpoolctl")
        limits = types.SimpleNamespace(restore_original_limits=lambda: None)
        made.ThreadpoolController = lambda: types.SimpleNamespace(limit=lambda **_: limits)
        sys.modules["threadpoolctl"] = made


_stand_in()
sys.path.insert(0, str(Path(__file__).parent))

import numpy  # noqa: E402
from fuzz_mutations import mutated  # noqa: E402
from fuzz_seeds import Seed, readers, seeds  # noqa: E402
from fuzz_words import Words  # noqa: E402

from surgery_formats.adapters.format import TakesAlpha  # noqa: E402
from surgery_formats.adapters.registry import formats, read_adapter  # noqa: E402
from surgery_formats.canonical.adapter import Adapter  # noqa: E402
from surgery_formats.canonical.consumption import check_consumed  # noqa: E402
from surgery_formats.containers.registry import containers, open_weights  # noqa: E402
from surgery_formats.dtypes import DType  # noqa: E402
from surgery_formats.errors import SurgeryError  # noqa: E402
from surgery_formats.models.checkpoint import open_checkpoint  # noqa: E402
from surgery_formats.updates import Fit, Update, is_unsized  # noqa: E402
from surgery_formats.updates.weights import HeldWeight  # noqa: E402


class TooSlowError(BaseException):
    """An execution took longer than it may; no handler of errors catches it."""


@dataclass(frozen=True)
class Fault:
    """What an execution did that it must not.

    Attributes:
        number: Of the execution.
        seed: Name of what was damaged.
        what: The last line of its traceback, and where it was raised: equal for equal faults.
        shown: The whole traceback.
    """

    number: int
    seed: str
    what: str
    shown: str


class Fuzzer:
    """Executions by their numbers.

    Attributes:
        found: The seeds.
        outcomes: How often executions ended in which way, by reader.
    """

    def __init__(self, seed: int, only: str = "") -> None:
        self.found = [one for one in seeds() if only in f"{one.reader} {one.name}"]
        self.outcomes: Counter[str] = Counter()
        self._seed = seed
        self._folder = Path()
        self._by_reader = {name: [one for one in self.found if one.reader == name] for name in readers()}
        self._readers = [name for name, some in self._by_reader.items() if some]
        self._words = Words.of([raw for one in self.found for raw in one.files.values()])
        self._last: Path | None = None

    @contextmanager
    def working(self, folder: Path | None = None) -> Iterator[None]:
        """With a folder for the files of executions, by default one in memory."""
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) else None
        self._folder = folder or Path(mkdtemp(prefix="surgery-fuzz-", dir=place))
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            if folder is None:
                shutil.rmtree(self._folder)

    def damaged(self, number: int) -> tuple[random.Random, Seed, dict[str, bytes]]:
        """The files of an execution."""
        draw = random.Random(f"{self._seed}-{number}")
        one = draw.choice(self._by_reader[draw.choice(self._readers)])
        return draw, one, mutated(draw, one.files, self._words)

    def run(self, number: int) -> Fault | None:
        """One execution."""
        draw, one, files = self.damaged(number)
        path = self.written(number, one, files)
        try:
            with _limited():
                outcome = read(path, one, draw)
        except SurgeryError as error:
            outcome = type(error).__name__
            if type(error) is SurgeryError or not str(error):
                return _fault(number, one, error)
        except (Exception, TooSlowError) as error:
            outcome = "FAULT"
            self.outcomes[f"{one.reader} {outcome}"] += 1
            return _fault(number, one, error)
        self.outcomes[f"{one.reader} {outcome}"] += 1
        return None

    def written(self, number: int, one: Seed, files: dict[str, bytes]) -> Path:
        """The files of an execution on disk, in the place of the last one's."""
        if self._last is not None:
            shutil.rmtree(self._last)
        self._last = folder = self._folder / f"{number}"
        for name, raw in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
        return folder / next(iter(files)) if one.alone else folder


def read(path: Path, one: Seed, draw: random.Random) -> str:
    """Read what lies at a path, in one of the ways in which commands do."""
    kind, _, name = one.reader.partition(":")
    choice = draw.random()
    if kind == "format" and choice < 0.9:
        known = formats()[name]
        alpha = 2.0 if isinstance(known, TakesAlpha) and choice < 0.4 else None
        adapter = read_adapter(path, alpha) if choice < 0.6 else known.read(path)
        _use(adapter, draw)
        return "read"
    if kind == "container" and choice < 0.3:
        for shards in containers()[name].open(path).values():
            _read_all(shards.tensors.values())
        return "read"
    if choice < 0.4:
        for shards in open_weights(path).values():
            _read_all(shards.tensors.values())
        return "read"
    checkpoint = open_checkpoint(path)
    for component in checkpoint.components.values():
        for weight in component.parameters.values():
            assert weight.shape
        component.names.resolve("model.layers.0.self_attn.q_proj.weight")
    return "read"


def _read_all(tensors: Any) -> None:
    for tensor in tensors:
        if tensor.numel <= 1 << 20:
            values = tensor.read()
            assert tuple(values.shape) == tensor.shape


def _use(adapter: Adapter, draw: random.Random) -> None:
    """What inspect, merge and convert ask of an adapter."""
    check_consumed(adapter)
    adapter.known_issues()
    assert adapter.parameters >= 0
    for site, chain in adapter.updates.items():
        assert str(site)
        for update in chain:
            _apply(update, draw)
    if adapter.prompt is not None:
        adapter.prompt.table.read()
    if draw.random() < 0.3:
        rendering = formats()[adapter.format].render(adapter, None)
        for tensor in rendering.tensors[:20]:
            assert tuple(tensor.load().shape) == tensor.shape


def _apply(update: Update, draw: random.Random) -> None:
    """An update applied to a weight of its sizes, if that is small."""
    rows, cols = (size or 12 for size in update.shape)
    assert update.kind
    update.low_rank()
    for factor in update.factors().values():
        if max(tensor.numel for tensor in factor.tensors) <= 1 << 16:
            assert tuple(factor.load(DType.F32).shape) == factor.shape
    if rows * cols > 1 << 16 or draw.random() < 0.5:
        return
    fitted = update.fitted(Fit((rows, cols), 1, (rows, cols))) if is_unsized(update) else update
    if fitted.shape != (rows, cols):  # which binding refuses
        return
    weight = numpy.ones((rows, cols))
    for first, part in fitted.parts():
        lines = range(part.shape[0]) if part.effect != "sets" else range(rows)
        block = slice(first, first + len(lines))
        part.prepare(HeldWeight(weight[block]))(weight[block].copy(), lines, range(cols))


def _fault(number: int, one: Seed, error: BaseException) -> Fault:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "surgery_formats" in frame.filename] or list(frames)
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
    what = f"{type(error).__name__} in {where}: {str(error)[:80]}"
    return Fault(number, one.name, what, "".join(traceback.format_exception(error)))


@contextmanager
def _limited() -> Iterator[None]:
    def over(*_: Any) -> None:
        raise TooSlowError(f"more than {LIMIT} seconds")

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# --- workers --------------------------------------------------------------------------------------------------------------


def _work(fuzzer: Fuzzer, worker: int, options: argparse.Namespace, beats: Any, results: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with fuzzer.working():
        for number in range(options.first + worker, options.first + options.executions, options.workers):
            beats[2 * worker] = number
            if (fault := fuzzer.run(number)) is not None:
                results.put(fault)
            beats[2 * worker + 1] += 1
        results.put(fuzzer.outcomes)


def main() -> int:
    """Run; 0 if there was no fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution")
    parser.add_argument("--match", default="", help="only seeds whose reader and name contain this")
    parser.add_argument("--only", type=int, help="run one execution here, and show its traceback")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of faults")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    numpy.seterr(all="ignore")
    fuzzer = Fuzzer(options.seed, options.match)
    if options.only is not None:
        return _once(fuzzer, options.only, options.keep)
    context = multiprocessing.get_context("fork")
    beats = context.Array("q", 2 * options.workers, lock=False)
    results = context.SimpleQueue()
    started = time.monotonic()
    workers = [
        context.Process(target=_work, args=(fuzzer, number, options, beats, results))
        for number in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    faults, outcomes = _watched(workers, options, beats, results)
    seconds = time.monotonic() - started
    done = sum(beats[1::2])
    for name in readers():
        own = {key.rpartition(" ")[2]: count for key, count in outcomes.items() if key.startswith(f"{name} ")}
        print(f"{name:28}", ", ".join(f"{count} {what}" for what, count in sorted(own.items())) or "NOT COVERED")
    print(f"\n{done} executions in {seconds:.0f} s, {done / seconds:.0f} a second by {options.workers} workers")
    print(f"{len(faults)} different faults")
    for what, some in faults.items():
        print(f"{len(some):6} {what}\n       {some[0].seed}, --only {some[0].number} --seed {options.seed}")
    if options.keep is not None:
        _keep(fuzzer, [fault for some in faults.values() for fault in some[:KEPT]], options.keep)
    return 1 if faults or done < options.executions else 0


def _watched(
    workers: list[Any], options: argparse.Namespace, beats: Any, results: Any
) -> tuple[dict[str, list[Fault]], Counter[str]]:
    """What the workers find until they end; one that is stuck is killed, and its execution is a fault."""
    faults: dict[str, list[Fault]] = {}
    outcomes: Counter[str] = Counter()
    seen = {number: (-1, time.monotonic()) for number in range(len(workers))}
    said = time.monotonic()
    ended: set[int] = set()
    while len(ended) < len(workers) or not results.empty():
        while not results.empty():
            got = results.get()
            if isinstance(got, Fault):
                faults.setdefault(got.what, []).append(got)
            else:
                outcomes += got
        now = time.monotonic()
        for number, worker in enumerate(workers):
            if number in ended:
                continue
            if beats[2 * number + 1] != seen[number][0]:
                seen[number] = beats[2 * number + 1], now
            stuck = now - seen[number][1] > STUCK + LIMIT
            if stuck:
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
            if not worker.is_alive():
                ended.add(number)
                if worker.exitcode:
                    what = "a worker was stuck" if stuck else f"a worker ended with {worker.exitcode}"
                    faults.setdefault(what, []).append(Fault(beats[2 * number], "", what, what))
        if now - said > 30:
            said = now
            print(f"{sum(beats[1::2])} done, {len(faults)} different faults", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return faults, outcomes


def _once(fuzzer: Fuzzer, number: int, keep: Path | None) -> int:
    """One execution in this process."""
    with fuzzer.working(keep):
        fault = fuzzer.run(number)
    _, one, _ = fuzzer.damaged(number)
    print(one.reader, one.name)
    print(fault.shown if fault else f"no fault: {dict(fuzzer.outcomes)}")
    return 1 if fault else 0


def _keep(fuzzer: Fuzzer, faults: list[Fault], folder: Path) -> None:
    """Inputs of faults, with what they did."""
    for fault in faults:
        if fault.seed:
            _, one, files = fuzzer.damaged(fault.number)
            for name, raw in files.items():
                path = folder / f"{fault.number}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)
            facts = {
                "what": fault.what,
                "seed": one.name,
                "reader": one.reader,
                "alone": one.alone,
                "shown": fault.shown,
            }
            (folder / f"{fault.number}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
