# SPDX-License-Identifier: Apache-2.0
"""What each way of merging into a quantised base keeps: survival, angle, and bits per byte on text nobody trained on.

    python benchmarks/quantised.py [--formats NF4 GPTQ4] [--weights 1 .25] [--part 1] [--bitsandbytes PYTHON] [--llama-cpp PYTHON]

The example's base is quantised by the fit of each codec, and by the programs themselves where a python has them; the
example's LoRA is merged into it by every way, at its whole strength and at a quarter. At the whole its update is as
large as a step of 4 bits, at a quarter it is what adapters of large models are: some hundredths to tenths of a step.
Models are scored as `examples/evaluate.py` does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, versions
from safetensors.numpy import save_file

sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from surgery_formats.storage.bitsandbytes.four_bit import levels_of
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.tensors.apply import scatter
from tests.support.gguf_file import F32, GgufTensor, RawGguf, any_value, text, u32

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Quantised:
    """A format: the empty tensors of a weight, and what config.json says of it."""

    tensors: Callable[[str, Array], Tensors]
    config: Mapping[str, Any]


def nf4(name: str, values: Array) -> Tensors:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(values.shape)}
    return {
        name: np.zeros((values.size // 2, 1), np.uint8),
        f"{name}.absmax": np.zeros(-(-values.size // 64), np.float32),
        f"{name}.quant_map": levels_of("nf4").values,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def int8(name: str, values: Array) -> Tensors:
    stem = name.removesuffix("weight")
    scales = np.zeros(len(values), np.float32)
    return {name: np.zeros(values.shape, np.int8), f"{stem}SCB": scales, f"{stem}weight_format": np.zeros((), np.uint8)}


def gptq(group: int) -> Callable[[str, Array], Tensors]:
    def tensors(name: str, values: Array) -> Tensors:
        (out, inputs), stem = values.shape, name.removesuffix("weight")
        groups = -(-inputs // group)
        return {
            f"{stem}qweight": np.zeros((inputs // 8, out), np.int32),
            f"{stem}qzeros": np.zeros((groups, out // 8), np.int32),
            f"{stem}scales": np.zeros((groups, out), np.float16),
            f"{stem}g_idx": (np.arange(inputs) // group).astype(np.int32),
        }

    return tensors


def awq(name: str, values: Array) -> Tensors:
    (out, inputs), stem = values.shape, name.removesuffix("weight")
    return {
        f"{stem}qweight": np.zeros((inputs, out // 8), np.int32),
        f"{stem}qzeros": np.zeros((inputs // 32, out // 8), np.int32),
        f"{stem}scales": np.zeros((inputs // 32, out), np.float16),
    }


def fp8(name: str, values: Array) -> Tensors:
    blocks = tuple(-(-size // 128) for size in values.shape)
    return {name: np.zeros(values.shape, DType.F8_E4M3.numpy), f"{name}_scale_inv": np.ones(blocks, np.float32)}


def mxfp4(name: str, values: Array) -> Tensors:
    out, inputs = values.shape
    return {name: np.zeros((out, inputs // 2), np.uint8), f"{name}_scale": np.zeros((out, inputs // 32), np.uint8)}


def nvfp4(name: str, values: Array) -> Tensors:
    out, inputs = values.shape
    return {
        name: np.zeros((out, inputs // 2), np.uint8),
        f"{name}_scale": np.zeros((out, inputs // 16), DType.F8_E4M3.numpy),
        f"{name}_scale_2": np.asarray(abs(values).max() / (6 * 448), np.float32),
    }


_BNB = {"quant_method": "bitsandbytes"}
FORMATS = {
    "NF4, blocks of 64": Quantised(nf4, {**_BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "GPTQ4, groups of 128": Quantised(gptq(128), {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}),
    "GPTQ4, groups of 32": Quantised(gptq(32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}),
    "AWQ4, groups of 32": Quantised(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    ),
    "MXFP4": Quantised(mxfp4, {"quant_method": "quark"}),
    "NVFP4": Quantised(nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "FP8, 128 x 128": Quantised(fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "LLM.int8": Quantised(int8, {**_BNB, "load_in_8bit": True}),
}
GGML = {"GGUF Q4_0": (2, 18), "GGUF Q8_0": (8, 34)}
"""Number of a type, and bytes of its blocks of 32. K-quants need rows of 256, which the example has not."""
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output",
}  # fmt: skip
_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def quantise(folder: Path, name: str) -> Path:
    """The example's base in a format, its projections alone: codes and scales are those of the codec's `fit`."""
    weights = logical(BASE)
    if name in GGML:
        model = gguf(folder, weights, *GGML[name])
    else:
        shutil.copytree(BASE, folder)
        model = folder
        tensors = {n: t.read() for n, t in open_checkpoint(BASE).main.tensors.items()}
        for each in [each for each in tensors if "_proj" in each]:
            del tensors[each]
            tensors |= FORMATS[name].tensors(each, weights[each])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = dict(FORMATS[name].config)
        (folder / "config.json").write_text(json.dumps(config))
    for parameter in open_checkpoint(model).main.parameters.values():
        storage = parameter.storage
        if storage.elements is not None:
            continue
        assert is_quantised(storage), storage.kind
        matrix = np.zeros(storage.shape, np.float32)
        scatter(matrix, parameter.view.locate(0, len(matrix)), weights[parameter.name])
        grid = storage.fit(0, matrix)
        assert grid is not None, name
        for piece in storage.pack(0, grid.nearest(matrix), grid):
            source = storage.sources[piece.part]
            with open(source.path, "r+b") as file:
                os.pwrite(file.fileno(), piece.data, source.offset + piece.offset)
    return model


def gguf(folder: Path, weights: Mapping[str, Array], kind: int, block: int) -> Path:
    """The base as llama.cpp has it, with empty codes."""
    folder.mkdir()
    config = json.loads((BASE / "config.json").read_text())
    tensors = {}
    for name, values in weights.items():
        stem = name.removesuffix(".weight")
        if name in _OUTSIDE:
            renamed = _OUTSIDE[name]
        else:
            _, _, layer, module = stem.split(".", 3)
            renamed = f"blk.{layer}.{_GGUF[module]}"
        if "_proj" in name and kind != F32:
            tensors[f"{renamed}.weight"] = GgufTensor(kind, values.shape, bytes(values.size // 32 * block))
        else:
            rows = _interleaved(values, config) if "q_proj" in name or "k_proj" in name else values
            tensors[f"{renamed}.weight"] = GgufTensor(F32, values.shape, rows.tobytes())
    sizes = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "context_length": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }
    entries = [("general.architecture", text("llama"))]
    entries += [(f"llama.{key}", u32(config[name])) for key, name in sizes.items()]
    entries += [("llama.attention.layer_norm_rms_epsilon", any_value(6, struct.pack("<f", config["rms_norm_eps"])))]
    return RawGguf(entries, tensors).write(folder / "model.gguf")


def _interleaved(values: Array, config: Mapping[str, Any]) -> Array:
    """Rows of rotary weights as llama.cpp has them: the two halves of a head in turn."""
    head = config["hidden_size"] // config["num_attention_heads"]
    halves = values.reshape(-1, 2, head // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def logical(model: Path) -> dict[str, Array]:
    """Every weight as the model's code has it, float32."""
    found = {}
    for name, parameter in open_checkpoint(model).main.parameters.items():
        storage = parameter.storage
        values = parameter.get(DType.F32) if len(storage.sizes) == 2 else cast(read_rows(storage), DType.F32)
        found[name] = np.ascontiguousarray(values).reshape(storage.sizes)
    return found


class Scorer:
    """Bits per byte of the example with other weights."""

    def __init__(self, part: float) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(BASE)
        whole = {kind: (ROOT / "examples" / "heldout" / f"{kind}.txt").read_text() for kind in ("target", "source")}
        self._texts = {kind: each[: int(len(each) * part)] for kind, each in whole.items()}

    def score(self, weights: Mapping[str, Array]) -> dict[str, float]:
        """By text."""
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, values in weights.items():
                own[name].copy_(torch.from_numpy(values))
        bits = {}
        for kind, each in self._texts.items():
            ids = self._tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]
            nats = evaluate.nats(self._model, ids, self._tokenizer.bos_token_id)
            bits[kind] = nats / math.log(2) / len(each.encode())
        return bits


BY_BITSANDBYTES = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
method = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=method, device_map="cpu").save_pretrained(sys.argv[2])
"""
BY_LLAMA_CPP = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = int(sys.argv[3])
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options) == 0
"""
LLAMA_CPP = {"Q4_K_M": 15, "Q8_0": 7}
"""``llama_ftype``."""


def by_bitsandbytes(folder: Path, python: str) -> Path:
    """The base as transformers saves it, its scales nested."""
    _foreign([python, "-c", BY_BITSANDBYTES, str(BASE), str(folder)])
    return folder


def by_llama_cpp(folder: Path, python: str, kind: str) -> Path:
    """The base quantised by llama.cpp."""
    weights = logical(BASE)
    plain = gguf(folder, weights, F32, 128)
    assert all(np.array_equal(values, weights[name]) for name, values in logical(plain).items())
    model = folder.with_suffix(".quantised")
    model.mkdir()
    _foreign([python, "-c", BY_LLAMA_CPP, str(plain), str(model / "model.gguf"), str(LLAMA_CPP[kind])])
    return model / "model.gguf"


def _foreign(command: list[str]) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])


def model_in(folder: Path) -> Path:
    """The folder, or the GGUF file that it is."""
    return next(iter(folder.glob("*.gguf")), folder)


def row(name: str, weight: float, scorer: Scorer, folder: Path, make: Callable[[Path], Path]) -> str:
    """One line of the table."""
    base = make(folder / "base")
    adapters = [(LORA, weight)]
    surgery.merge(base, adapters, output=folder / "attached", dtype="fp32")
    attached = logical(model_in(folder / "attached"))
    scores = {"base": scorer.score(logical(base)), "attached": scorer.score(attached)}
    accounts = {}
    for rounding in ("nearest", "feedback"):
        out = folder / rounding
        result = surgery.merge(base, adapters, output=out, quantized="requantize", rounding=rounding, accept_loss=True)
        accounts[rounding] = result.as_json()["ledger"]["requantised"]
        scores[rounding] = scorer.score(logical(model_in(out)))
    surgery.merge(base, adapters, output=folder / "16 bits")
    scores["16 bits"] = scorer.score(logical(model_in(folder / "16 bits")))
    surgery.merge(base, adapters, output=folder / "residual", quantized="residual")
    surgery.merge(model_in(folder / "residual"), folder / "residual" / "adapter", output=folder / "both", dtype="fp32")
    scores["residual"] = scorer.score(logical(model_in(folder / "both")))
    for text_kind in ("target", "source"):
        assert abs(scores["residual"][text_kind] / scores["attached"][text_kind] - 1) < 0.005
    bits = {which: f"{each['target']:.4f} / {each['source']:.4f}" for which, each in scores.items()}
    cells = [name, f"{weight:g}", *(bits[which] for which in ("base", "attached", "16 bits"))]
    for rounding in ("nearest", "feedback"):
        angle = math.degrees(math.acos(min(1.0, accounts[rounding]["correlation"])))
        inside = math.degrees(math.acos(min(1.0, accounts[rounding]["inside"]["correlation"])))
        cells.append(f"{accounts[rounding]['survival']:.0%}, {angle:.0f}°, {inside:.0f}°")
        cells.append(bits[rounding])
    return "| " + " | ".join([*cells, bits["residual"]]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="*", default=[], help="only those whose name contains one of these")
    parser.add_argument("--weights", nargs="*", type=float, default=[1.0, 0.25])
    parser.add_argument("--part", type=float, default=1.0, help="of the held-out texts")
    parser.add_argument("--bitsandbytes", help="a python with transformers and bitsandbytes, to quantise as they do")
    parser.add_argument("--llama-cpp", help="a python with llama_cpp, to quantise as llama.cpp does")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scorer = Scorer(options.part)
    plain = {weight: scorer.score(logical(BASE)) for weight in options.weights[:1]}
    print(f"bfloat16 base: {plain}\n")
    columns = ["format", "LoRA", "base", "attached", "16 bits", "nearest", "bits", "feedback", "bits", "residual"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|", flush=True)
    makers: dict[str, Callable[[Path], Path]] = {name: partial(quantise, name=name) for name in [*FORMATS, *GGML]}
    if options.bitsandbytes:
        makers["NF4 by bitsandbytes, nested"] = partial(by_bitsandbytes, python=options.bitsandbytes)
    for kind in LLAMA_CPP if options.llama_cpp else ():
        makers[f"GGUF {kind} by llama.cpp"] = partial(by_llama_cpp, python=options.llama_cpp, kind=kind)
    for name, make in makers.items():
        if options.formats and not any(part in name for part in options.formats):
            continue
        for weight in options.weights:
            with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:
                print(row(name, weight, scorer, Path(folder), make), flush=True)
    print(f"\n{versions('numpy', 'torch', 'transformers')}")


if __name__ == "__main__":
    main()
