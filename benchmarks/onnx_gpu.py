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
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch  # isort: skip  # before onnxruntime, which then uses the CUDA libraries that torch brings
import numpy as np
import onnx
import onnxruntime
from onnx_gpu_codes import beside_builder, codes, exported, spawn, with_tokenizer
from onnx_gpu_gate import gate
from onnx_gpu_model import EIGHT_B, export, write_model, write_prefix, write_slots
from onnx_gpu_profile import elsewhere, kernels
from onnx_gpu_right import right
from onnx_gpu_run import CACHE, PROMPT, VIRTUAL, Run, tables
from shapes import LARGE, LINEAR, Shape, write_adapter

from surgery.onnx.graph.target import OperatorSet
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery.onnx.run.decoder import text_past
from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.merge import merge

STEPS = 300
SMALL = Shape(256, 2, 4, 2, 512, 2048)  # for a rehearsal: --small
GEMM_TUNING = {"ep.cuda.enable_gemm_auto_tune": "1"}
XQA = {"ORT_ENABLE_XQA": "1"}  # which `open_graph` switches off


@dataclass(frozen=True)
class Variant:
    """A way to run the base that may be faster: other operators, or other settings of onnxruntime."""

    name: str
    target: Callable[[OperatorSet], OperatorSet] = lambda target: target
    session: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    edit: Callable[[onnx.ModelProto], None] | None = None


def windowed(model: onnx.ModelProto) -> None:
    """Attention with a window that no sequence leaves, for which onnxruntime takes other kernels."""
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("local_window_size", 8 * CACHE))


VARIANTS = (
    Variant("as exported"),
    Variant("the same once more"),  # how far apart two sessions of one graph are
    Variant("SiLU apart from its product", lambda t: replace(t, gate="apart")),
    Variant("norms apart from sums", lambda t: replace(t, norm="standard")),
    Variant("nothing packed", lambda t: replace(t, packed="none")),
    Variant("gate and up packed", lambda t: replace(t, packed="all")),
    Variant("SiLU by division", lambda t: replace(t, silu="division")),
    Variant("ScaledSiLU", lambda t: replace(t, silu="scaled")),
    Variant("GEMM tuning", session=GEMM_TUNING),
    Variant("GEMM tuning, Gemm", lambda t: replace(t, linear="gemm"), session=GEMM_TUNING),
    Variant("GEMM tuning by replay", session=GEMM_TUNING, environment={"ORT_CUDA_GEMM_GRAPH_REPLAY_TUNING": "1"}),
    Variant("XQA attention", environment=XQA),
    Variant("no flash decoding", environment={"ORT_DISABLE_FLASH_DECODE": "1"}),
    Variant("a window longer than the cache", edit=windowed),
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
    base = run.open_timed(base_path)
    (folder / "prefix.onnx_adapter").write_bytes(adapter_bytes(text_past(base.opened, run.ahead).arrays))
    prefix, shipped = f"prefix of {VIRTUAL}", f"exported with a prefix of {VIRTUAL}"
    if not (run.work / "prefix").exists():
        write_prefix(run.shape, run.work / "prefix", VIRTUAL)
    export_onnx(
        folder, output=run.work / f"{dtype}-prefix", prefix=[run.work / "prefix"], target="cuda", dtype=dtype, weights="link",
    )  # fmt: skip
    sides = {
        "base": base,
        "merged": run.open_timed(merged_path),
        prefix: run.open_timed(base_path, prompt_adapter=folder / "prefix.onnx_adapter", max_length=CACHE - VIRTUAL),
        shipped: run.open_timed(run.work / f"{dtype}-prefix" / "model.onnx", max_length=CACHE - VIRTUAL),
        "base once more": run.open_timed(base_path),
        "slots, LoRA r16 in": run.open_timed(slots_path, adapters=[folder / "lora.onnx_adapter"]),
        "packed slots, LoRA r16 in": run.open_timed(packed_path, adapters=[folder / "packed.onnx_adapter"]),
    }
    if dtype == "bf16":
        half_path, _ = export(folder, "half.onnx", run.target, "fp16")
        sides["computed in fp16"] = run.open_timed(half_path)
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


def before(run: Run, dtype: str, tree: Path | None) -> None:
    """The base's graph of an older tree (its `surgery`, `formats` and `cli`), in turns with today's."""
    if tree is None:
        run.skipped.append("before: --before names no tree")
        return
    tree = tree.resolve()
    path = [str(tree), str(tree / "formats"), str(tree / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(path)}
    out = run.work / f"{dtype}-before"
    where = ("--target", "cuda", "--dtype", dtype) if run.device == "cuda" else ("--target", "cpu")
    source = (run.work / dtype).resolve()
    words = ("-m", "surgery_cli", "-q", "export-onnx", source, "-o", out.resolve(), *where, "--weights", "link")
    spawn(*words, environment=environment, folder=tree)  # whose package is found first
    exported(run, run.work / dtype, run.work / f"{dtype}-today", "--weights", "link")
    today = run.work / f"{dtype}-today" / "model.onnx"
    with setting(XQA):  # as the runner of before had it
        sides = {
            "of before": run.open_timed(out / "model.onnx"),
            "of before once more": run.open_timed(out / "model.onnx"),
        }
    sides |= {"of before, today's runner": run.open_timed(out / "model.onnx"), "of today": run.open_timed(today)}
    label = f"{dtype} before and today"
    run.measured(label, sides, [run.tokens], prefills=20)
    run.ratio(label, "of today", "decode", 0.95)


SLOTTED = {
    "all seven weights": LINEAR,
    "attention": [module for module in LINEAR if "attn" in module],
    "q and v": ["self_attn.q_proj", "self_attn.v_proj"],
}


def slots(run: Run, dtype: str) -> None:
    """Packed slots by the weights that have some, and with kernels as cuBLAS chooses them instead of measured ones."""
    folder, off = run.work / dtype, {"ep.cuda.enable_gemm_auto_tune": "0"}
    sides = {"base": run.open_timed(folder / "model.onnx")}
    for name, modules in SLOTTED.items():
        stem = f"slots-{name.replace(' ', '-')}"
        path, contract = export(
            folder, f"{stem}.onnx", run.target, dtype, True, run.shape, packed=True, modules=modules
        )
        write_slots(folder / f"{stem}.onnx_adapter", contract, run.work / "lora", dtype)
        adapters = [folder / f"{stem}.onnx_adapter"]
        sides[f"slots of {name}"] = run.open_timed(path, adapters=adapters)
        if modules is LINEAR:
            sides["as cuBLAS chooses"] = run.open_timed(path, adapters=adapters, session_config=off)
    run.measured(f"{dtype} slots", sides, [run.tokens], 200, prefills=20)
    run.ratio(f"{dtype} slots", "slots of all seven weights", "decode", 1.35)


def variants(run: Run, dtype: str) -> None:
    """Every variant in one process, in turns."""
    folder, sides = run.work / dtype, {}
    graphs: dict[OperatorSet, Path] = {}
    for variant in VARIANTS:
        target = variant.target(run.target)
        if target not in graphs:
            graphs[target], _ = export(folder, f"variant{len(graphs)}.onnx", target, dtype)
        graph = graphs[target]
        if variant.edit is not None:
            model = onnx.load(graph, load_external_data=False)
            variant.edit(model)
            graph = folder / "edited.onnx"
            graph.write_bytes(model.SerializeToString())
        try:
            with setting(variant.environment):
                side = run.open_timed(graph, session_config=variant.session, cuda_graph=variant.name != "no CUDA graph")
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
    """Kernels of a step as exported and with XQA attention; what is not on the device."""
    path = run.work / dtype / "model.onnx"
    for name, environment in (("as exported", {}), ("XQA attention", XQA)):
        with setting(environment):
            lines = kernels(run.open_timed(path), run.tokens, run.work)
        run.profile += [line | {"what": f"{name}: {line['what']}"} for line in lines]
    run.profile += elsewhere(path, run.tokens, run.work, batch=1, max_length=CACHE, device=run.device)


def batches(run: Run, dtype: str) -> None:
    rows = np.random.default_rng(3).integers(3, run.shape.vocabulary, (8, PROMPT)).tolist()
    run.measured(dtype, {"base": run.open_timed(run.work / dtype / "model.onnx", batch=8)}, rows, 100)


SHAPES = (
    (1, PROMPT, CACHE),
    (8, PROMPT, CACHE),
    (32, PROMPT, CACHE),
    (1, PROMPT, 8192),
    (1, 6000, 8192),
    (4, 6000, 8192),
)


def attention(run: Run, dtype: str) -> None:
    """The base with XQA and without, by rows, tokens before and the size of the cache."""
    if not (run.work / dtype).exists():
        write_model(run.shape, run.work / dtype, dtype)
        export(run.work / dtype, "model.onnx", run.target, dtype)
    graph = run.work / dtype / "model.onnx"
    for rows, tokens, cache in SHAPES:
        with setting(XQA):
            sides = {"XQA": run.open_timed(graph, batch=rows, max_length=cache)}
        sides["as opened"] = run.open_timed(graph, batch=rows, max_length=cache)
        ids = np.random.default_rng(3).integers(3, run.shape.vocabulary, (rows, tokens)).tolist()
        run.measured(f"{dtype} {rows} x {tokens} of {cache}", sides, ids, 80, prefills=3)


def eight_b(run: Run, dtype: str) -> None:
    shape = EIGHT_B if run.shape == LARGE else run.shape
    write_model(shape, run.work / "8b", dtype)
    path, _ = export(run.work / "8b", "model.onnx", run.target, dtype)
    run.measured(f"{dtype} 8B", {"base": run.open_timed(path)}, [run.tokens], 40)


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
    """Graphs of onnxruntime-genai's builder by our runner in turns with ours, and that of fp16 by their own runtime."""
    if unpacked_to is None:
        if (spec := importlib.util.find_spec("onnxruntime_genai")) is None or spec.origin is None:
            run.skipped.append("genai: onnxruntime-genai is not installed, --genai names no folder")
            return
        unpacked_to = Path(spec.origin).parents[1]
    beside_builder(run, dtype, unpacked_to)
    source, out = with_tokenizer(run, dtype), run.work / f"{dtype}-genai"
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(unpacked_to.resolve())])
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    where = ("-p", dtype, "-e", "cuda") if run.device == "cuda" else ("-p", "fp32", "-e", "cpu")
    builder = unpacked_to / "onnxruntime_genai" / "models" / "builder.py"  # as a file: it needs none of the libraries
    _, seconds, _ = spawn(builder, "-i", source, "-o", out, *where, "-c", run.work / "cache", environment=environment)
    print(f"  built in {seconds:.1f} s", flush=True)
    sides = {"base": run.open_timed(run.work / dtype / "model.onnx"), "genai builder's graph": run.open_timed(out)}
    run.measured(f"{dtype} genai", sides, [run.tokens])
    del sides
    if not any((unpacked_to / "onnxruntime_genai").glob("*.so")):
        run.skipped.append("genai's own runtime: only its builder is there")
        return
    said, _, _ = spawn(
        Path(__file__).with_name("onnx_gpu_genai.py"), out, PROMPT, CACHE, 100, environment=environment
    )  # fmt: skip
    line = {"dtype": f"{dtype} genai", "graph": "genai builder's graph, their runtime", "batch": 1}
    run.rows.append(line | json.loads(said.splitlines()[-1]))
    print(f"  genai's own runtime: {run.rows[-1]['decode_ms']:.3f} ms/token", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts: dict[str, Callable[[Run], None]] = {
        "fp16": lambda run: core(run, "fp16"),
        "bf16": lambda run: core(run, "bf16"),
        "before": lambda run: before(run, "fp16", options.before),
        "slots": lambda run: slots(run, "fp16"),
        "variants": lambda run: variants(run, "fp16"),
        "attention": lambda run: attention(run, "fp16"),
        "gate": gate,
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
    parser.add_argument("--before", type=Path, help="an older checkout, whose base graph is compared with today's")
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
