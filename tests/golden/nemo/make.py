# SPDX-License-Identifier: Apache-2.0
"""Makes LoRAs as NeMo 1.x packs them, and what its layers make of the base: ``../litgpt/base``, a Llama whose heads share keys.

    python make.py [--check] [--peer LORA_CONVERTER]

NeMo runs on a GPU with Megatron and Apex only, so its published layout is followed: the rows of ``linear_qkv`` group by group
(``convert_llama_hf_to_nemo.py``), ``linear_out @ linear_in * alpha / dim`` added to what the fused layer gives, and its outputs split as
``MCoreSelfAttentionMixin.get_query_key_value_tensors`` splits them. ``expected.safetensors`` has the weights after that, in float64.
``--peer`` is ``nemo/export/utils/lora_converter.py`` of NeMo (2fac26a8), whose own unfusing is compared with it. Needs torch and PyYAML.
"""

from __future__ import annotations

import argparse
import io
import runpy
import sys
import tarfile
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
BASE = HERE.parent / "litgpt/base/model.safetensors"
LAYERS, HIDDEN, INNER, HEADS, GROUPS = 2, 32, 48, 4, 2
HEAD = HIDDEN // HEADS
AT, OF_MLP = "self_attention.adapter_layer", "mlp.adapter_layer"
SIZES = {
    f"{AT}.lora_kqv_adapter": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
    f"{AT}.lora_dense_attention_adapter": (HIDDEN, HIDDEN),
    f"{OF_MLP}.lora_hto4h_adapter": (2 * INNER, HIDDEN),
    f"{OF_MLP}.lora_4htoh_adapter": (HIDDEN, INNER),
    f"{AT}.lora_unfused_kqv_adapter.q_adapter": (HEADS * HEAD, HIDDEN),
    f"{AT}.lora_unfused_kqv_adapter.k_adapter": (GROUPS * HEAD, HIDDEN),
    f"{AT}.lora_unfused_kqv_adapter.v_adapter": (GROUPS * HEAD, HIDDEN),
    f"{OF_MLP}.lora_unfused_hto4h_adapter.gate_adapter": (INNER, HIDDEN),
    f"{OF_MLP}.lora_unfused_hto4h_adapter.up_adapter": (INNER, HIDDEN),
}
FUSED, CANONICAL = list(SIZES)[:4], [*list(SIZES)[4:], *list(SIZES)[1:4:2]]
CASES: dict[str, dict[str, Any]] = {
    "fused": {"names": FUSED, "dim": 3, "alpha": 7},
    "canonical": {"names": CANONICAL, "dim": 2, "alpha": 5, "variant": "canonical", "prefix": "model.module.decoder"},
    "qkv": {"names": FUSED[:1], "dim": 4, "alpha": "${model.peft.lora_tuning.adapter_dim}", "dtype": torch.bfloat16},
}


def draw(name: str, *sizes: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (rng.standard_normal(sizes) / 4).astype(np.float32)


def to_fused(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """``linear_qkv`` of a Llama: the heads of each group, its key, its value."""
    parts = []
    for group in range(GROUPS):
        each = HEADS // GROUPS
        parts += [q.reshape(HEADS, HEAD, -1)[group * each : (group + 1) * each].reshape(each * HEAD, -1)]
        parts += [part.reshape(GROUPS, HEAD, -1)[group] for part in (k, v)]
    return np.concatenate(parts)


def from_fused(mixed: np.ndarray) -> tuple[np.ndarray, ...]:
    """Its outputs, taken apart as the layer does; the last axis of torch's code is the first of a weight."""
    by_group = mixed.reshape(GROUPS, (HEADS // GROUPS + 2) * HEAD, -1)
    ends = [HEADS // GROUPS * HEAD, (HEADS // GROUPS + 1) * HEAD]
    return tuple(part.reshape(-1, mixed.shape[1]) for part in np.split(by_group, ends, axis=1))


def changed(base: dict[str, np.ndarray], deltas: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of transformers after the layers of a model have what the adapters add."""
    found: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights = {n: base[f"{at}.{n}.weight"].astype(np.float64) for n in NAMES}
        qkv = to_fused(*(weights[f"self_attn.{n}_proj"] for n in "qkv"))
        gate_up = np.concatenate([weights["mlp.gate_proj"], weights["mlp.up_proj"]])
        mine = {name.partition("/")[2]: delta for name, delta in deltas.items() if name.startswith(f"{layer}/")}
        qkv = qkv + mine.get(FUSED[0], 0)
        parts = dict(zip("qkv", from_fused(qkv), strict=True))
        for part in parts:  # MCoreSelfAttentionMixin adds these to the heads
            parts[part] = parts[part] + mine.get(f"{AT}.lora_unfused_kqv_adapter.{part}_adapter", 0)
        both = [
            mine.get(f"{OF_MLP}.lora_unfused_hto4h_adapter.{n}_adapter", np.zeros((INNER, 1))) for n in ("gate", "up")
        ]
        gate_up = gate_up + mine.get(FUSED[2], 0) + np.concatenate([part + np.zeros((1, HIDDEN)) for part in both])
        after = {f"self_attn.{n}_proj": part for n, part in parts.items()}
        after["self_attn.o_proj"] = weights["self_attn.o_proj"] + mine.get(FUSED[1], 0)
        after["mlp.gate_proj"], after["mlp.up_proj"] = np.split(gate_up, 2)
        after["mlp.down_proj"] = weights["mlp.down_proj"] + mine.get(FUSED[3], 0)
        found |= {f"{at}.{n}.weight": new for n, new in after.items() if not np.array_equal(new, weights[n])}
    return {name: value.astype(np.float32) for name, value in found.items()}


NAMES = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]


def config(case: dict[str, Any]) -> dict[str, Any]:
    tuning = {
        "variant": case.get("variant", "nemo"),
        "target_modules": ["attention_qkv"] if len(case["names"]) == 1 else ["all"],
        "adapter_dim": case["dim"],
        "alpha": case["alpha"],
        "adapter_dropout": 0.0,
        "weight_tying": False,
        "position_embedding_strategy": None,
    }
    return {
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": INNER,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": None,
        "activation": "fast-swiglu",
        "restore_from_path": "llama-tiny.nemo",
        "peft": {"peft_scheme": "lora", "lora_tuning": tuning},
        "data": {"train_ds": {"file_names": ["train.jsonl"], "prompt_template": "{input}\n\nhidden_size: {output}\n"}},
        "optim": [{"name": "adam", "lr": 0.1}, {"name": "sgd", "lr": 0.2}],
    }


def pack(path: Path, files: dict[str, bytes]) -> None:
    """As ``NLPSaveRestoreConnector._make_nemo_file_from_folder``: an archive of ``.``, not compressed."""
    with tarfile.open(path, "w:") as tar:
        top = tarfile.TarInfo("./")
        top.type, top.mtime = tarfile.DIRTYPE, 1.5  # type: ignore[assignment]  # a float, as tar.add has it
        tar.addfile(top)
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))


def make(root: Path, peer: Path | None) -> None:
    base = load_file(BASE)
    for name, case in CASES.items():
        folder = root / name
        folder.mkdir(parents=True)
        state, deltas = {}, {}
        dim, stored = case["dim"], case.get("dtype", torch.float32)
        scale = 1.0 if isinstance(case["alpha"], str) else case["alpha"] / dim
        for layer in range(LAYERS):
            for adapter in case["names"]:
                out, inputs = SIZES[adapter]
                stem = f"{case.get('prefix', 'model.decoder')}.layers.{layer}.{adapter}"
                a = torch.from_numpy(draw(f"{name}.{stem}.a", dim, inputs)).to(stored)
                b = torch.from_numpy(draw(f"{name}.{stem}.b", out, dim)).to(stored)
                state |= {f"{stem}.linear_in.weight": a, f"{stem}.linear_out.weight": b}
                deltas[f"{layer}/{adapter}"] = scale * (b.double() @ a.double()).numpy()
        expected = changed(base, deltas)
        if peer is not None and "variant" not in case:
            check(peer, config(case), dict(state), scale, base, expected)
        weights = io.BytesIO()
        torch.save(state, weights)
        settings = yaml.safe_dump(config(case), sort_keys=False).encode()
        pack(folder / "adapter.nemo", {"model_config.yaml": settings, "model_weights.ckpt": weights.getvalue()})
        save_file(expected, folder / "expected.safetensors")


def check(peer: Path, settings: Any, state: Any, scale: float, base: Any, expected: dict[str, np.ndarray]) -> None:
    """NeMo's own unfusing of the same factors gives the same weights."""
    sys.modules["nemo"] = sys.modules["nemo.export"] = types.ModuleType("nemo")
    sys.modules["nemo.export.tarutils"] = types.ModuleType("tarutils")
    vars(sys.modules["nemo.export.tarutils"])["TarPath"] = None
    code = runpy.run_path(str(peer))
    unfused = code["convert_lora_weights_to_canonical"](settings, state)
    renamed, _ = code["reformat_module_names_to_hf"](unfused)
    theirs = {}
    for key, b in renamed.items():
        stem, _, side = key.removesuffix(".weight").rpartition(".")
        if side == "lora_B":
            name = stem.removeprefix("base_model.").replace("model.model.", "model.").replace("_adapter.", ".")
            name = name.replace("lora_unfused_kqv.", "").replace("lora_unfused_hto4h.", "") + ".weight"
            theirs[name] = base[name] + scale * (b.double() @ renamed[f"{stem}.lora_A.weight"].double()).numpy()
    assert theirs.keys() == expected.keys(), sorted(theirs.keys() ^ expected.keys())
    assert all(np.allclose(theirs[name], expected[name], atol=1e-6) for name in theirs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep

    keep(HERE, lambda root: make(root, options.peer), check=options.check)


if __name__ == "__main__":
    main()
