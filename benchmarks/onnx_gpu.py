# SPDX-License-Identifier: Apache-2.0
"""What an exported graph costs on a CUDA device, beside the floor, the base's own graph and other runtimes, and whether it is right.

    python benchmarks/onnx_gpu.py --work gpu --out gpu.json

Needs onnxruntime-gpu and torch with CUDA, transformers for the reference; onnxruntime-genai is measured if it is there, or if --genai
names the folder it was unpacked to. Each part says how long it took, a part that fails is reported and does not stop the others, and parts
are left out once the time budget is spent.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch  # isort: skip  # before onnxruntime, which then uses the CUDA libraries that torch brings
import numpy as np
import onnxruntime
from onnx_gpu_model import EIGHT_B, export, write_model, write_prefix, write_slots
from onnx_gpu_profile import elsewhere, kernels
from onnx_gpu_right import right
from onnx_gpu_run import CACHE, PROMPT, VIRTUAL, Run, tables
from shapes import LARGE, Shape, write_adapter

from surgery.onnx.graph.target import OperatorSet
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery.onnx.run.decoder import text_past
from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.merge import merge

STEPS = 300
SMALL = Shape(256, 2, 4, 2, 512, 2048)  # for a rehearsal: --small
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "base"  # its tokenizer; which one it is does not matter

GEMM_TUNING = {"ep.cuda.enable_gemm_auto_tune": "1"}
NO_XQA = {"ORT_ENABLE_XQA": "0"}


@dataclass(frozen=True)
class Variant:
    """A way to run the base that may be faster: other operators, or other settings of onnxruntime."""

    name: str
    target: Callable[[OperatorSet], OperatorSet] = lambda target: target
    session: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


VARIANTS = (
    Variant("as exported"),
    Variant("the same once more"),  # how far apart two sessions of one graph are
    Variant("norms apart from sums", lambda t: replace(t, norm="standard")),
    Variant("nothing packed", lambda t: replace(t, packed="none")),
    Variant("gate and up packed", lambda t: replace(t, packed="all")),
    Variant("SiLU by division", lambda t: replace(t, silu="division")),
    Variant("ScaledSiLU", lambda t: replace(t, silu="scaled")),
    Variant("GEMM tuning", session=GEMM_TUNING),
    Variant("GEMM tuning, Gemm", lambda t: replace(t, linear="gemm"), session=GEMM_TUNING),
    Variant("GEMM tuning by replay", session=GEMM_TUNING, environment={"ORT_CUDA_GEMM_GRAPH_REPLAY_TUNING": "1"}),
    Variant("no XQA attention", environment=NO_XQA),
    Variant("no XQA attention, no flash decoding", environment=NO_XQA | {"ORT_DISABLE_FLASH_DECODE": "1"}),
    Variant("no XQA attention, GEMM tuning", session=GEMM_TUNING, environment=NO_XQA),
    Variant("no CUDA graph"),
)  # fmt: skip


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


def core(run: Run, dtype: str) -> None:
    """The base, merged, with a soft prompt, with slots: in turns. A bf16 file is computed in fp16 as well."""
    folder = run.work / dtype
    write_model(run.shape, folder, dtype)
    began = time.perf_counter()
    base_path, _ = export(folder, "model.onnx", run.target, dtype)
    print(f"  exported in {time.perf_counter() - began:.3f} s", flush=True)
    adapter = run.work / "lora"
    if not adapter.exists():
        write_adapter(run.shape, adapter)
    merge(folder, adapter, output=run.work / f"{dtype}-merged", device=run.device)
    merged_path, _ = export(run.work / f"{dtype}-merged", "model.onnx", run.target, dtype)
    slots_path, contract = export(folder, "slots.onnx", run.target, dtype, True, run.shape)
    write_slots(folder / "lora.onnx_adapter", contract, adapter, dtype)
    packed_path, contract = export(folder, "packed.onnx", run.target, dtype, True, run.shape, packed=True)
    write_slots(folder / "packed.onnx_adapter", contract, adapter, dtype)
    base = run.bind(base_path)
    (folder / "prefix.onnx_adapter").write_bytes(adapter_bytes(text_past(base.opened, run.ahead).arrays))
    prefix, shipped = f"prefix of {VIRTUAL}", f"exported with a prefix of {VIRTUAL}"
    if not (run.work / "prefix").exists():
        write_prefix(run.shape, run.work / "prefix", VIRTUAL)
    export_onnx(
        folder, output=run.work / f"{dtype}-prefix", prefix=[run.work / "prefix"], target="cuda", dtype=dtype, weights="link",
    )  # fmt: skip
    sides = {
        "base": base,
        "merged": run.bind(merged_path),
        prefix: run.bind(base_path, prompt_adapter=folder / "prefix.onnx_adapter", max_length=CACHE - VIRTUAL),
        shipped: run.bind(run.work / f"{dtype}-prefix" / "model.onnx", max_length=CACHE - VIRTUAL),
        "base once more": run.bind(base_path),
        "slots, LoRA r16 in": run.bind(slots_path, adapters=[folder / "lora.onnx_adapter"]),
        "packed slots, LoRA r16 in": run.bind(packed_path, adapters=[folder / "packed.onnx_adapter"]),
    }
    if dtype == "bf16":
        half_path, _ = export(folder, "half.onnx", run.target, "fp16")
        sides["computed in fp16"] = run.bind(half_path)
    lines, _ = run.measured(dtype, sides, [run.tokens], prefills=20)
    run.check(f"{dtype} base: decode / floor", lines[0]["ratio"], 2.25)
    run.ratio(dtype, "merged", "decode", 1.01)
    for one in (prefix, shipped):
        run.ratio(dtype, one, "decode", 1.01)
        run.ratio(dtype, one, "first token", 1.03)
    right(run, dtype, "base", folder, sides["base"], [])
    right(run, dtype, "merged", run.work / f"{dtype}-merged", sides["merged"], [])
    right(run, dtype, prefix, folder, sides[prefix], run.ahead)
    if dtype == "bf16":
        run.check("bf16 file computed in fp16: decode / floor", lines[-1]["ratio"], 2.25)
        right(run, "fp16", "of the bf16 file", folder, sides["computed in fp16"], [])


def variants(run: Run, dtype: str) -> None:
    """Every variant in one process, in turns."""
    folder, sides = run.work / dtype, {}
    graphs: dict[OperatorSet, Path] = {}
    for variant in VARIANTS:
        target = variant.target(run.target)
        if target not in graphs:
            graphs[target], _ = export(folder, f"variant{len(graphs)}.onnx", target, dtype)
        try:
            with setting(variant.environment):
                side = run.bind(
                    graphs[target], session_config=variant.session, cuda_graph=variant.name != "no CUDA graph"
                )
                assert side.decoder is not None
                side.decoder.prefill([run.tokens])
                for _ in range(3):
                    side.decoder.step([5])  # what is tuned at the first run is tuned now, under this environment
            sides[variant.name] = side
        except Exception as error:  # onnxruntime's types, without a common base: it refuses settings it does not know
            run.skipped.append(f"variant {variant.name}: {str(error)[:200]}")
    reference = None
    for name, side in sides.items():
        assert side.decoder is not None
        logits = side.decoder.prefill([run.tokens]).astype(np.float32)
        logits = side.decoder.step([5]).astype(np.float32)
        reference = logits if reference is None else reference
        error = float(np.abs(logits - reference).max() / np.abs(reference).max())
        run.check(f"{dtype} variant '{name}': logits as the first's", error, 2e-2)
    run.measured(f"{dtype} variant", sides, [run.tokens], 200)


def profiled(run: Run, dtype: str) -> None:
    """Kernels of a step as exported and without XQA attention; what is not on the device."""
    path = run.work / dtype / "model.onnx"
    for name, environment in (("as exported", {}), ("no XQA attention", NO_XQA)):
        with setting(environment):
            lines = kernels(run.bind(path), run.tokens, run.work)
        run.profile += [line | {"what": f"{name}: {line['what']}"} for line in lines]
    run.profile += elsewhere(path, run.tokens, run.work, batch=1, max_length=CACHE, device=run.device)


def batches(run: Run, dtype: str) -> None:
    rows = np.random.default_rng(3).integers(3, run.shape.vocabulary, (8, PROMPT)).tolist()
    run.measured(dtype, {"base": run.bind(run.work / dtype / "model.onnx", batch=8)}, rows, 100)


def eight_b(run: Run, dtype: str) -> None:
    shape = EIGHT_B if run.shape == LARGE else run.shape
    write_model(shape, run.work / "8b", dtype)
    path, _ = export(run.work / "8b", "model.onnx", run.target, dtype)
    run.measured(f"{dtype} 8B", {"base": run.bind(path)}, [run.tokens], 40)


CODES: dict[str, dict[str, Any]] = {
    "int4, blocks of 32": {"weights_type": "int4"},
    "int4, blocks of 128": {"weights_type": "int4", "block": 128},
    "int8, blocks of 128": {"weights_type": "int8", "block": 128},
}
LIMITS = {"": 0.72, "8b": 0.55}
"""What a token of 4 bits may take of one of 16."""


def codes(run: Run, dtype: str, folder: str = "") -> None:
    """Graphs of codes beside the base's, in turns; of the 8 B shape if its folder is named."""
    source = run.work / (folder or dtype)
    sides = {"base": run.bind(source / "model.onnx")}
    for name, options in CODES.items():
        out = run.work / f"{folder}{dtype}-{name.replace(' ', '')}"
        kind = dtype if run.device == "cuda" else "auto"
        export_onnx(source, output=out, target=run.target.name, dtype=kind, **options)
        sides[name] = run.bind(out / "model.onnx")
    label = f"{dtype} codes {folder}".strip()
    run.measured(label, sides, [run.tokens], 40 if folder else 200)
    reference = None
    for name, side in sides.items():
        assert side.decoder is not None
        logits = side.decoder.prefill([run.tokens]).astype(np.float32)
        reference = logits if reference is None else reference
        error = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
        run.check(f"{label} {name}: error of logits", error, 0.05 if "int8" in name else 0.6)
    run.ratio(label, "int4, blocks of 128", "decode", LIMITS[folder])
    run.ratio(label, "int4, blocks of 128", "first token", 1.15)


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
        places = torch.arange(PROMPT, device=run.device)[None]
        model(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=places)
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
    line = {"dtype": dtype, "graph": "torch.compile, static cache", "batch": 1, "decode_ms": taken}
    run.rows.append(line | {"load_s": sum(seconds[:20])})
    print(f"  {dtype} torch.compile: {taken:.3f} ms/token", flush=True)


def genai(run: Run, dtype: str, unpacked_to: Path | None) -> None:
    """The graph of onnxruntime-genai's builder, by our runner in turns with ours, and by their own."""
    if unpacked_to is None:
        if (spec := importlib.util.find_spec("onnxruntime_genai")) is None or spec.origin is None:
            run.skipped.append("genai: onnxruntime-genai is not installed, --genai names no folder")
            return
        unpacked_to = Path(spec.origin).parents[1]
    source, out = run.work / f"{dtype}-tokenizer", run.work / f"{dtype}-genai"
    source.mkdir()
    for file in (*(run.work / dtype).glob("model.safetensors"), run.work / dtype / "config.json"):
        (source / file.name).symlink_to(file.resolve())
    for file in EXAMPLE.glob("tokenizer*"):
        shutil.copy(file, source)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), str(unpacked_to.resolve())]
    )
    where = ("-p", dtype, "-e", "cuda") if run.device == "cuda" else ("-p", "fp32", "-e", "cpu")
    builder = unpacked_to / "onnxruntime_genai" / "models" / "builder.py"  # as a file: it needs none of the libraries

    def spawn(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=150, check=False, env=environment
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        return done.stdout

    began = time.perf_counter()
    spawn(builder, "-i", source, "-o", out, *where, "-c", run.work / "cache")
    print(f"  built in {time.perf_counter() - began:.1f} s", flush=True)
    sides = {"base": run.bind(run.work / dtype / "model.onnx"), "genai builder's graph": run.bind(out)}
    run.measured(f"{dtype} genai", sides, [run.tokens])
    del sides
    said = spawn(Path(__file__).with_name("onnx_gpu_genai.py"), out, PROMPT, CACHE, 100)
    line = {"dtype": f"{dtype} genai", "graph": "genai builder's graph, their runtime", "batch": 1}
    run.rows.append(line | json.loads(said.splitlines()[-1]))
    print(f"  genai's own runtime: {run.rows[-1]['decode_ms']:.3f} ms/token", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts: dict[str, Callable[[Run], None]] = {
        "fp16": lambda run: core(run, "fp16"),
        "bf16": lambda run: core(run, "bf16"),
        "variants": lambda run: variants(run, "fp16"),
        "batch8": lambda run: batches(run, "fp16"),
        "codes": lambda run: codes(run, "fp16"),
        "8b": lambda run: eight_b(run, "fp16"),
        "8b codes": lambda run: codes(run, "fp16", "8b"),
        "genai": lambda run: genai(run, "fp16", options.genai),
        "compile": lambda run: compiled(run, "fp16"),
        "profile": lambda run: profiled(run, "fp16"),  # last: what watches kernels may slow down what comes after it
    }
    parser.add_argument("--work", type=Path, required=True, help="new folder, for 35 GB")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "onnx_gpu.json")
    parser.add_argument(
        "--parts", default=",".join(parts), help="default: %(default)s; all but fp16 and bf16 need fp16's files"
    )
    parser.add_argument("--genai", type=Path, help="folder with onnxruntime_genai and onnx_ir, where not installed")
    parser.add_argument("--budget", type=float, default=330, help="seconds after which no part is begun")
    parser.add_argument("--small", action="store_true", help="a tiny model: to see whether the script runs")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    onnxruntime.set_default_logger_severity(3)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    run = Run(
        options.work, options.budget, SMALL if options.small else LARGE, 10 if options.small else STEPS, options.device
    )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"# {name}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}", flush=True)
    for part in options.parts.split(","):
        run.part(part, lambda part=part: parts[part](run))
    shown = tables(run)
    found = {
        "device": name, "onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "prompt": PROMPT, "cache": CACHE,
        "rows": run.rows, "ratios": run.ratios, "precision": run.precision, "profile": run.profile, "checks": run.checks,
        "failed": run.failed, "skipped": run.skipped, "seconds": run.seconds, "table": shown,
    }  # fmt: skip
    options.out.write_text(json.dumps(found, indent=2))
    print(shown)
    return int(bool(run.failed) or not all(check["good"] for check in run.checks))


if __name__ == "__main__":
    sys.exit(main())
