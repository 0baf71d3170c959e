# SPDX-License-Identifier: Apache-2.0
"""What an exported graph costs on a CUDA device, beside the floor, the base's own graph and other runtimes, and whether it is right.

    python benchmarks/onnx_gpu.py --work /tmp/gpu --out gpu.json

Needs onnxruntime-gpu and torch with CUDA, transformers for the reference; onnxruntime-genai is measured if it is there. Each part says how
long it took, a part that fails is reported and does not stop the others, and parts are left out once the time budget is spent.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch  # isort: skip  # before onnxruntime, which then uses the CUDA libraries that torch brings
import numpy as np
import onnxruntime
from onnx_gpu_model import EIGHT_B, export, unpacked, write_model, write_slots
from shapes import LARGE, Shape, write_adapter

from surgery.merge import merge
from surgery.onnx.adapter_file import write_adapter_file
from surgery.onnx.bench import Bound, bind, floor_seconds, measure, step_nbytes
from surgery.onnx.run.decoder import text_past
from surgery.onnx.target import TARGETS, Target

PROMPT, CACHE, VIRTUAL, STEPS, GREEDY = 512, 1024, 20, 100, 32
SMALL = Shape(256, 2, 4, 2, 512, 2048)  # for a rehearsal: --small

GEMM_TUNING = {"ep.cuda.enable_gemm_auto_tune": "1"}


@dataclass(frozen=True)
class Variant:
    """A way to run the base that may be faster: other operators, or other settings of onnxruntime."""

    name: str
    target: Callable[[Target], Target] = lambda target: target
    session: Mapping[str, str] = field(default_factory=dict)
    provider: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


VARIANTS = (
    Variant("as exported"),
    Variant("Gemm instead of FusedMatMul", lambda t: replace(t, linear="gemm")),
    Variant("Sigmoid and Mul instead of QuickGelu", lambda t: replace(t, activation="standard")),
    Variant("norms apart from sums", lambda t: replace(t, norm="standard")),
    Variant("nothing packed", unpacked),
    Variant("GEMM tuning", session=GEMM_TUNING),
    Variant("GEMM tuning, Gemm", lambda t: replace(t, linear="gemm"), session=GEMM_TUNING),
    Variant("GEMM tuning by replay", session=GEMM_TUNING, environment={"ORT_CUDA_GEMM_GRAPH_REPLAY_TUNING": "1"}),
    Variant("XQA attention", environment={"ORT_ENABLE_XQA": "1"}),
    Variant("no XQA attention", environment={"ORT_ENABLE_XQA": "0"}),
    Variant("GEMM tuning, XQA", session=GEMM_TUNING, environment={"ORT_ENABLE_XQA": "1"}),
    Variant("cuDNN attention", environment={"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "1"}),
    Variant("memory-efficient attention", provider={"sdpa_kernel": "2"}),
    Variant("small-N GEMV", environment={"ORT_ENABLE_SMALL_N_GEMV": "1"}),
    Variant("tunable operators", provider={"tunable_op_enable": "1", "tunable_op_tuning_enable": "1"}),
    Variant("MLP as one expert", lambda t: replace(t, mlp="expert")),
    Variant("no CUDA graph"),
)  # fmt: skip


class Run:
    """The state of one benchmark: folders, time, findings."""

    def __init__(self, work: Path, budget: float, shape: Shape, steps: int, device: str) -> None:
        self.work, self.budget, self.shape, self.steps, self.device = work, budget, shape, steps, device
        self.began = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.seconds: dict[str, float] = {}
        self.tokens = np.random.default_rng(1).integers(3, shape.vocabulary, PROMPT).tolist()
        self.ahead = np.random.default_rng(2).integers(3, shape.vocabulary, VIRTUAL).tolist()

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Do a part of it, if there is time left."""
        if (spent := time.perf_counter() - self.began) > self.budget:
            self.skipped.append(f"{name}: left out, {spent:.0f} s are spent")
            return
        began = time.perf_counter()
        try:
            work()
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        self.seconds[name] = time.perf_counter() - began
        print(f"# {name}: {self.seconds[name]:.1f} s", flush=True)
        gc.collect()  # sessions of this part
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def bind(self, path: Path, **options: Any) -> Bound:
        return bind(path, **{"batch": 1, "max_length": CACHE, "device": self.device, **options})

    def measured(
        self, dtype: str, sides: Mapping[str, Bound], rows: list[list[int]], steps: int | None = None
    ) -> list[dict[str, Any]]:
        """Measure in turns, floors before and after, and keep a line of each."""
        floors = {name: [self.floor(side)] for name, side in sides.items()}
        times = measure(list(sides.values()), rows, steps or self.steps)
        found = []
        for (name, side), (prefill, token) in zip(sides.items(), times, strict=True):
            floor = statistics.mean([*floors[name], self.floor(side)])
            line = {
                "dtype": dtype, "graph": name, "batch": len(rows), "decode_ms": (token or 0) * 1e3,
                "floor_ms": floor * 1e3, "ratio": (token or 0) / floor, "first_token_ms": prefill * 1e3,
                "load_s": side.load_seconds, "memory_gb": side.memory_nbytes / 1e9, "weights_gb": step_nbytes(side.opened.path) / 1e9,
            }  # fmt: skip
            found.append(line)
            print(
                f"  {dtype} {name}: {line['decode_ms']:.3f} ms/token, {line['ratio']:.3f} x floor {line['floor_ms']:.3f} ms",
                flush=True,
            )
        self.rows += found
        return found

    def floor(self, side: Bound) -> float:
        return floor_seconds(side) if self.device == "cuda" else float("nan")

    def check(self, what: str, value: float, limit: float) -> None:
        good = value <= limit
        self.checks.append({"what": what, "value": value, "limit": limit, "good": bool(good)})
        print(f"  {'ok  ' if good else 'MISS'} {what}: {value:.4f} (limit {limit})", flush=True)


@contextlib.contextmanager
def setting(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, which onnxruntime reads when it makes its kernels."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def target_of(run: Run) -> Target:
    return TARGETS["cuda" if run.device == "cuda" else "cpu"]


def core(run: Run, dtype: str) -> None:
    """The base, merged, with a soft prompt, with slots, without CUDA graph: in turns."""
    folder = run.work / dtype
    write_model(run.shape, folder, dtype)
    began = time.perf_counter()
    base_path, _ = export(folder, "model.onnx", target_of(run), dtype)
    print(f"  exported in {time.perf_counter() - began:.3f} s", flush=True)
    adapter = run.work / "lora"
    if not adapter.exists():
        write_adapter(run.shape, adapter)
    merge(folder, adapter, output=run.work / f"{dtype}-merged", device=run.device)
    merged_path, _ = export(run.work / f"{dtype}-merged", "model.onnx", target_of(run), dtype)
    slots_path, contract = export(folder, "slots.onnx", target_of(run), dtype, True, run.shape)
    write_slots(folder / "lora.onnx_adapter", contract, adapter, dtype)
    base = run.bind(base_path)
    write_adapter_file(folder / "prefix.onnx_adapter", text_past(base.opened, run.ahead).arrays)
    sides = {
        "base": base,
        "merged": run.bind(merged_path),
        f"prefix of {VIRTUAL}": run.bind(
            base_path, prompt_adapter=folder / "prefix.onnx_adapter", max_length=CACHE - VIRTUAL
        ),
        "slots, LoRA r16 in": run.bind(slots_path, adapters=[folder / "lora.onnx_adapter"]),
    }
    lines = run.measured(dtype, sides, [run.tokens])
    first, merged, prefix, _ = lines
    run.check(f"{dtype} base: decode / floor", first["ratio"], 2.25)
    run.check(f"{dtype} merged: decode / base", merged["decode_ms"] / first["decode_ms"], 1.01)
    run.check(f"{dtype} prefix: decode / base", prefix["decode_ms"] / first["decode_ms"], 1.01)
    run.check(f"{dtype} prefix: first token / base", prefix["first_token_ms"] / first["first_token_ms"], 1.03)
    right(run, dtype, "base", folder, sides["base"], [])
    right(run, dtype, "merged", run.work / f"{dtype}-merged", sides["merged"], [])
    right(run, dtype, "prefix", folder, sides[f"prefix of {VIRTUAL}"], run.ahead)


def right(run: Run, dtype: str, name: str, folder: Path, side: Bound, ahead: Sequence[int]) -> None:
    """Logits and greedy tokens against torch in float32 on the same weights, along the reference's own tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(run.device).eval()
    ids, cache, wanted = torch.tensor([[*ahead, *run.tokens]], device=run.device), None, []
    with torch.inference_mode():
        for _ in range(GREEDY):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            wanted.append(out.logits[0, -1].float().cpu().numpy())
            ids = out.logits[:, -1:].argmax(-1)
    assert side.decoder is not None
    logits, worst, spread, differing = side.decoder.prefill([run.tokens]), 0.0, 0.0, 0
    for step, reference in enumerate(wanted):
        found = logits[0].astype(np.float32)
        error = np.abs(found - reference).max()
        worst = max(worst, float(error / np.abs(reference).max()))
        spread = max(spread, float(np.linalg.norm(found - reference) / np.linalg.norm(reference)))
        best, second = np.sort(reference)[-2:][::-1]
        if found.argmax() != reference.argmax() and best - second > 2 * error:
            differing += 1
        if step + 1 < len(wanted):
            logits = side.decoder.step([int(reference.argmax())])
    run.check(f"{dtype} {name}: largest logit error / largest logit, {GREEDY} steps", worst, 1e-2)
    run.check(f"{dtype} {name}: greedy tokens that differ and are no near ties", differing, 0)
    run.checks[-2]["l2"] = spread
    del model


def variants(run: Run, dtype: str) -> None:
    """Every variant in one process, in turns."""
    folder, sides = run.work / dtype, {}
    graphs: dict[Target, Path] = {}
    for variant in VARIANTS:
        target = variant.target(target_of(run))
        try:
            if target not in graphs:
                graphs[target], _ = export(folder, f"variant{len(graphs)}.onnx", target, dtype)
            with setting(variant.environment):
                side = run.bind(
                    graphs[target], session_config=variant.session, provider_options=variant.provider,
                    cuda_graph=variant.name != "no CUDA graph",
                )  # fmt: skip
                assert side.decoder is not None
                side.decoder.prefill([run.tokens])
                for _ in range(3):
                    side.decoder.step([5])  # what is tuned at the first run is tuned now, under this environment
            sides[variant.name] = side
        except Exception as error:  # a setting this version does not know is a finding
            run.skipped.append(f"variant {variant.name}: {str(error)[:200]}")
    reference = None
    for name, side in sides.items():
        assert side.decoder is not None
        logits = side.decoder.prefill([run.tokens]).astype(np.float32)
        logits = side.decoder.step([5]).astype(np.float32)
        reference = logits if reference is None else reference
        error = float(np.abs(logits - reference).max() / np.abs(reference).max())
        run.check(f"{dtype} variant '{name}': logits as the first's", error, 2e-2)
    run.measured(f"{dtype} variant", sides, [run.tokens])


def batches(run: Run, dtype: str) -> None:
    rows = np.random.default_rng(3).integers(3, run.shape.vocabulary, (8, PROMPT)).tolist()
    run.measured(dtype, {"base": run.bind(run.work / dtype / "model.onnx", batch=8)}, rows)


def eight_b(run: Run, dtype: str) -> None:
    shape = EIGHT_B if run.shape == LARGE else run.shape
    write_model(shape, run.work / "8b", dtype)
    path, _ = export(run.work / "8b", "model.onnx", target_of(run), dtype)
    run.measured(f"{dtype} 8B", {"base": run.bind(path)}, [run.tokens], 40)


def compiled(run: Run, dtype: str) -> None:
    """torch.compile with a static cache, as transformers documents it."""
    from transformers import AutoModelForCausalLM, StaticCache

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(run.work / dtype, dtype=kind).to(run.device).eval()
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    ids = torch.tensor([run.tokens], device=run.device)
    seconds = []
    with torch.inference_mode():
        model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.arange(PROMPT, device=run.device)[None],
        )
        token = ids[:, -1:].clone()
        for number in range(60):
            place = torch.tensor([[PROMPT + number]], device=run.device)
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            step(input_ids=token, past_key_values=cache, use_cache=True, position_ids=place)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    taken = statistics.median(seconds[20:]) * 1e3
    run.rows.append(
        {
            "dtype": dtype,
            "graph": "torch.compile, static cache",
            "batch": 1,
            "decode_ms": taken,
            "load_s": sum(seconds[:20]),
        }
    )
    print(f"  {dtype} torch.compile: {taken:.3f} ms/token", flush=True)


def genai(run: Run, dtype: str) -> None:
    """The graph of onnxruntime-genai's builder, by our runner."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        run.skipped.append("genai: onnxruntime-genai is not installed")
        return
    out = run.work / f"{dtype}-genai"
    words = ["-m", "onnxruntime_genai.models.builder", "-m", run.work / dtype, "-o", out, "-p", dtype, "-e", "cuda"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    print(f"  built in {time.perf_counter() - began:.1f} s", flush=True)
    sides = {"base": run.bind(run.work / dtype / "model.onnx"), "genai builder's graph": run.bind(out)}
    run.measured(dtype, sides, [run.tokens])


def table(run: Run) -> str:
    lines = [
        "| type | graph | batch | decode ms/token | x floor | floor ms | first token ms | load s |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def number(line: Mapping[str, Any], key: str, form: str) -> str:
        return format(line[key], form) if key in line else "-"

    for line in run.rows:
        cells = [
            line["dtype"], line["graph"], str(line["batch"]), number(line, "decode_ms", ".3f"), number(line, "ratio", ".2f"),
            number(line, "floor_ms", ".3f"), number(line, "first_token_ms", ".2f"), number(line, "load_s", ".2f"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| check | value | limit | |", "|---|---|---|---|"]
    lines += [
        f"| {c['what']} | {c['value']:.4f} | {c['limit']} | {'ok' if c['good'] else '**missed**'} |" for c in run.checks
    ]
    return "\n".join([*lines, "", *(f"- {text}" for text in [*run.failed, *run.skipped])])


def main() -> int:
    parts: dict[str, Callable[[Run], None]] = {
        "fp16": lambda run: core(run, "fp16"),
        "variants": lambda run: variants(run, "fp16"),
        "bf16": lambda run: core(run, "bf16"),
        "batch8": lambda run: batches(run, "fp16"),
        "genai": lambda run: genai(run, "fp16"),
        "8b": lambda run: eight_b(run, "fp16"),
        "compile": lambda run: compiled(run, "fp16"),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="new folder, for 30 GB")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "onnx_gpu.json")
    parser.add_argument(
        "--parts", default=",".join(parts), help="default: %(default)s; all but fp16 and bf16 need fp16's files"
    )
    parser.add_argument("--budget", type=float, default=330, help="seconds after which no part is begun")
    parser.add_argument("--small", action="store_true", help="a tiny model: to see whether the script runs")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    run = Run(
        options.work, options.budget, SMALL if options.small else LARGE, 10 if options.small else STEPS, options.device
    )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"# {name}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}", flush=True)
    for part in options.parts.split(","):
        run.part(part, lambda part=part: parts[part](run))
    shown = table(run)
    found = {
        "device": name, "onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "prompt": PROMPT, "cache": CACHE,
        "rows": run.rows, "checks": run.checks, "failed": run.failed, "skipped": run.skipped, "seconds": run.seconds, "table": shown,
    }  # fmt: skip
    options.out.write_text(json.dumps(found, indent=2))
    print(shown)
    return int(bool(run.failed) or not all(check["good"] for check in run.checks))


if __name__ == "__main__":
    sys.exit(main())
