# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp makes of merged GGUF files, in an environment with llama-cpp-python: SURGERY_LLAMA_CPP names its python."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery.reference import forward, open_reference
from surgery_formats.arrays import Array
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.gguf_file import GgufTensor, RawGguf, any_value, text, u32
from tests.support.kit import ROOT

pytestmark = pytest.mark.nightly

SCRIPT = ROOT / "tests" / "oracles" / "llama_cpp_peer.py"
BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"
WIDE = ROOT / "tests" / "containers" / "golden" / "wide.gguf"
Q4_0, Q8_0, Q5_1, Q4_K_M = 2, 7, 9, 15  # enum llama_ftype
PROMPT, COUNT = [0, 17, 301, 45, 9, 810], 40

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def peer(*words: object) -> str:
    python = os.environ["SURGERY_LLAMA_CPP"]
    done = subprocess.run([python, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


def converted(path: Path) -> Path:
    """The example's base as llama.cpp's converter would write it in float16, without a tokenizer; by hand."""
    base = open_checkpoint(BASE).main
    config, tensors = base.config, {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, parameter in base.parameters.items():
        module = name.removesuffix(".weight")
        layer, stem = "", module
        if module.startswith("model.layers."):
            number, _, stem = module.removeprefix("model.layers.").partition(".")
            layer = f"blk.{number}."
        stem, held = _NAMES[stem], parameter.get().astype(np.float32)
        if stem in heads:
            held = held.reshape(heads[stem], 2, -1, held.shape[1]).swapaxes(1, 2).reshape(held.shape)
        if held.shape[1] == 1:
            tensors[f"{layer}{stem}.weight"] = GgufTensor(0, held.shape[:1], np.ascontiguousarray(held).tobytes())
        else:
            tensors[f"{layer}{stem}.weight"] = GgufTensor(1, held.shape, held.astype(np.float16).tobytes())
    sizes = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "rope.dimension_count": "head_dim",
        "vocab_size": "vocab_size",
    }
    entries = [("general.architecture", text("llama")), ("general.file_type", u32(1))]
    entries += [(f"llama.{key}", u32(config[ours])) for key, ours in sizes.items()]
    epsilon = any_value(6, struct.pack("<f", config["rms_norm_eps"]))
    entries += [("llama.attention.layer_norm_rms_epsilon", epsilon), ("tokenizer.ggml.model", text("none"))]
    return RawGguf(entries, tensors).write(path)


def ours(path: Path, ids: list[int], count: int) -> tuple[list[int], Array]:
    """Greedy tokens, and the logits that each was chosen by."""
    model, tokens = open_reference(open_checkpoint(path).main), list(ids)
    for _ in range(count):
        tokens.append(int(forward(model, torch.tensor([tokens])).logits[0, -1].argmax()))
    chosen = forward(model, torch.tensor([tokens])).logits[0, len(ids) - 1 : -1].numpy()
    return tokens[len(ids) :], chosen


@pytest.mark.parametrize("file_type", [None, Q8_0, Q4_K_M, Q5_1, Q4_0])
@pytest.mark.parametrize("quantized", ["dequantize", "requantize"])
def test_a_merged_gguf_speaks_in_llama_cpp_as_it_does_here(
    quantized: str, file_type: int | None, tmp_path: Path
) -> None:
    base = converted(tmp_path / "base-F16.gguf")
    if file_type is not None:
        quantised = tmp_path / "base.gguf"
        peer("quantise", base, quantised, file_type)
        base = quantised
    surgery.merge(base, LORA, output=tmp_path / "merged", quantized=quantized)
    (merged,) = (tmp_path / "merged").glob("*.gguf")
    tokens, logits = ours(merged, PROMPT, COUNT)
    plain = quantized == "dequantize" or file_type is None
    if plain:
        assert json.loads(peer("greedy", merged, json.dumps(PROMPT), COUNT))["tokens"] == tokens
    peer("logits", merged, json.dumps(PROMPT + tokens[:-1]), tmp_path / "logits.npy")
    theirs = np.load(tmp_path / "logits.npy")[len(PROMPT) - 1 :]
    apart = np.abs(theirs - logits).max(axis=1)
    print(f"{quantized} {file_type}: logits differ by at most {apart.max():.3g} of {np.abs(logits).max():.3g}")
    assert apart.max() < (0.02 if plain else 1.0)  # activations beside quantised weights have 8 bits there
    two = np.sort(logits, axis=1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > 2 * apart
    assert clear.sum() > COUNT * (0.95 if plain else 0.5)
    assert (theirs.argmax(axis=1) == np.array(tokens))[clear].all()


def test_a_merge_into_k_quants_loads_in_llama_cpp(tmp_path: Path) -> None:
    """A random model with rows of whole blocks: Q4_K, Q6_K and Q5_0, merged and written in the same types."""
    from tests.verbs.test_merge_gguf import adapter, layer_weights, main

    lora = adapter(tmp_path / "lora", layer_weights(main(WIDE)))
    surgery.merge(WIDE, lora, output=tmp_path / "merged", quantized="requantize")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    for path in (WIDE, tmp_path / "merged" / "wide.gguf"):
        wanted = forward(open_reference(open_checkpoint(path).main), torch.tensor([ids])).logits[0].numpy()
        peer("logits", path, json.dumps(ids), tmp_path / "logits.npy")
        apart = np.abs(np.load(tmp_path / "logits.npy") - wanted).max()
        print(f"{path.name}: {apart:.3g} of {np.abs(wanted).max():.3g}")
        assert apart < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("written", ["by its converter", "here"])
def test_a_lora_in_llama_cpp_is_the_merged_model(written: str, name: str, tmp_path: Path) -> None:
    golden = ROOT / "tests" / "golden" / "gguf" / name
    base, lora, ids = golden / "base.gguf", golden / "lora" / "adapter.gguf", json.dumps([3, 1, 4, 1, 5, 9, 2, 6])
    if written == "here":  # of PEFT's folder, with a scale for one module that the converter would leave out
        folder = tmp_path / "peft"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(
            (lora.parent / "peft/adapter_model.safetensors").read_bytes()
        )
        config = json.loads((lora.parent / "peft/adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"q_proj": 2.0}}))
        lora = tmp_path / "lora.gguf"
        surgery.convert(folder, "gguf", output=lora, base=golden / "base")
    surgery.merge(base, lora, output=tmp_path / "merged")
    peer("logits", tmp_path / "merged" / "base.gguf", ids, tmp_path / "merged.npy")
    peer("logits", base, ids, tmp_path / "attached.npy", lora)
    peer("logits", base, ids, tmp_path / "base.npy")
    merged, attached, before = (np.load(tmp_path / f"{which}.npy") for which in ("merged", "attached", "base"))
    apart, moved = np.abs(attached - merged).max(), np.abs(merged - before).max()
    print(f"{name} {written}: {apart:.3g} of {moved:.3g}")
    assert apart < 1e-4 * moved
