# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.oracles.selfcheck [name part ...]``: build every case and prove that its answer is one.

Checked per fault: it can be made, leaves the good files alone, and its pickles would indeed run if someone loaded them.
Checked per case: the answer has the base's tensors (and only differs where it says so), differs from the base, and a model loaded
from it computes what the attached model computes; in half precision, whether PEFT's own bits agree with ``peft_rounds_once``.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.oracles import disk, faults, hostile, measure, models, peft_oracle
from tests.oracles.cases import CASES, Built, build

__all__ = ["check"]

LOGITS = 1e-6  # float64 models; some norms and softmaxes run in float32 inside


def check(built: Built) -> str:
    """Facts about a built case in one line; raises AssertionError where the answer is none."""
    base = disk.read_tensors(built.base)
    gone, new = sorted(base.keys() - built.expected.keys()), sorted(built.expected.keys() - base.keys())
    assert not gone, f"lost {gone}"
    assert not new or built.config.get("tie_word_embeddings") is False, f"unexpected {new}"
    assert built.changed, "nothing changed"
    for name in base.keys() - built.changed:
        assert torch.equal(built.expected[name], base[name]), name
        assert built.expected[name].dtype == base[name].dtype, name
    for name in built.changed & base.keys():
        before, after = base[name].double(), built.expected[name].double()
        assert before.shape != after.shape or (after - before).norm() > 1e-3 * before.norm(), f"{name} hardly moved"
    facts = [f"{len(built.changed):3d}/{len(base):3d} changed"]
    if built.attached is not None:
        merged = models.run(
            built.case.arch, models.load(built.case.arch, built.base, tensors=built.reference64, config=built.config)
        )
        plain = models.run(built.case.arch, models.load(built.case.arch, built.base))
        scale = float(built.attached.abs().max())
        error = float((merged - built.attached).abs().max()) / scale
        assert error < LOGITS, f"logits off by {error:.1e}"
        if plain.shape == built.attached.shape:
            moved = float((plain - built.attached).abs().max()) / scale
            assert moved > 1e-3, f"the adapter moves the logits by {moved:.1e} only: the check is blind"
        facts.append(f"logits {error:.0e}")
    else:
        models.run(
            built.case.arch, models.load(built.case.arch, built.base, tensors=built.reference64, config=built.config)
        )
    if built.case.name == "mixtral-per-expert":  # the one adapter of its kind that PEFT converts rightly
        peer = peft_oracle.merge(built.case.arch, built.base, built.adapters).tensors
        worst = max(measure.relative_error(peer[k], built.reference64[k]) for k in peer)
        assert worst < 1e-12, f"the formula and PEFT differ by {worst:.1e}"
        facts.append(f"formula against PEFT {worst:.0e}")
    if built.peft is not None:
        worst = max(
            measure.relative_error(v, built.reference64[k]) for k, v in built.peft.items() if k in built.changed
        )
        facts.append(f"peft rel {worst:.0e}")
        if built.case.dtype != "float32":
            same = [k for k in built.changed if built.peft[k].dtype == built.expected[k].dtype]
            ulps = max(
                (measure.ulp_error(built.peft[k], built.reference64[k], base.get(k)) for k in same),
                default=float("nan"),
            )
            bits = sum(
                measure.bit_differences(built.expected[k], built.peft[k], built.reference64[k], base.get(k))
                for k in same
            )
            loose = sum(int((built.expected[k] != built.peft[k]).sum()) for k in same)
            facts.append(f"ulp {ulps:.3f} bits {bits} ({loose}) {'once' if built.peft_rounds_once else ''}")
            assert not built.peft_rounds_once or bits == 0, f"PEFT differs in {bits} bits"
        else:
            assert worst < 1e-6, f"PEFT in float32 is off by {worst:.1e}"
    return "  ".join(facts)


def _state(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def check_faults() -> int:
    """Make every fault once; returns how many there are."""
    with disk.scratch() as folder:
        base, adapter = faults.good(folder / "good")
        before = _state(base, adapter)
        for fault in faults.FAULTS:
            (folder / fault.name).mkdir()
            fault.make(base, adapter, folder / fault.name)
        assert _state(base, adapter) == before, "a fault changed the good files"
        for name, write in hostile.PICKLES.items():
            marker = folder / f"{name}-{hostile.MARKER}"
            write(folder / "evil.bin", marker)
            with contextlib.suppress(RuntimeError, AttributeError, pickle.UnpicklingError):
                torch.load(folder / "evil.bin", weights_only=False)
            assert marker.exists(), f"pickle {name} is harmless"
    return len(faults.FAULTS)


def main(parts: list[str]) -> int:
    """Check the cases whose name contains one of ``parts`` (all without); returns the number of failures."""
    torch.set_num_threads(1)
    failed, began, slowest = [], time.perf_counter(), 0.0
    for case in CASES.values():
        if parts and not any(p in case.name for p in parts):
            continue
        with disk.scratch() as folder:
            start = time.perf_counter()
            try:
                built = build(case, folder)
                seconds = time.perf_counter() - start
                slowest = max(slowest, seconds)
                print(f"{case.name:32s} {seconds:5.2f} s  {check(built)}  {built.config or ''}", flush=True)
            except Exception as error:  # report all failures, then fail
                failed.append(case.name)
                print(f"{case.name:32s} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
                if parts:
                    traceback.print_exc()
    if not parts:
        print(f"{check_faults()} faults can be made")
    print(
        f"{len(CASES)} cases, {time.perf_counter() - began:.0f} s, slowest {slowest:.2f} s, failed: {failed or 'none'}"
    )
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
