# SPDX-License-Identifier: Apache-2.0
"""Makes the MLX-LM golden files with mlx-lm's own training, saving and fusing code.

Run it from this folder, in an environment that has ``mlx[cpu]`` and ``mlx-lm`` (see ../README.md)::

    python make.py

It rewrites every ``*/base``, every adapter folder and ``versions.json``. ``expected.safetensors`` of an
adapter holds, under Hugging Face names and orientation, each weight that mlx-lm's fuse changed, as it left it
(W', float32). Each is first checked against the documented formula in float64; a difference stops the run.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]

HERE = Path(__file__).resolve().parent

DENSE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocab_size": 64,
}
MOE = DENSE | {"hidden_size": 16, "intermediate_size": 24, "num_experts_per_tok": 2, "vocab_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DENSE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
    "qwen2": DENSE
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    | {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 48},
    "mixtral": MOE
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 3}
    | {"tie_word_embeddings": False},
    "qwen3_moe": MOE
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 3, "head_dim": 4}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 24, "norm_topk_prob": True}
    | {"tie_word_embeddings": False},
    "gpt_oss": MOE
    | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 3, "head_dim": 4}
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Case:
    """One adapter to train: which base, which mlx-lm arguments."""

    base: str
    name: str
    rank: int
    scale: float
    num_layers: int
    fine_tune_type: str = "lora"
    keys: list[str] = field(default_factory=list)


CASES = [
    # keys absent: every Linear (and Switch, Embedding) inside the last num_layers blocks, here only layer 1.
    Case("llama", "lora-last1", rank=4, scale=20.0, num_layers=1),
    # relative names mean the last num_layers blocks; full paths that one module, whatever num_layers is.
    Case(
        "llama",
        "lora-keys",
        rank=3,
        scale=2.5,
        num_layers=1,
        keys=[
            "self_attn.q_proj",
            "self_attn.v_proj",
            "mlp.down_proj",
            "model.layers.0.self_attn.o_proj",
            "model.embed_tokens",
            "lm_head",
        ],
    ),
    # 0 means all blocks, like -1.
    Case("llama", "lora-zero", rank=2, scale=20.0, num_layers=0, keys=["self_attn.k_proj"]),
    Case("llama", "dora", rank=4, scale=10.0, num_layers=-1, fine_tune_type="dora"),
    Case(
        "llama",
        "dora-embed",
        rank=2,
        scale=20.0,
        num_layers=1,
        fine_tune_type="dora",
        keys=["self_attn.q_proj", "model.embed_tokens", "lm_head"],
    ),
    # "full" stores absolute weights of the last num_layers blocks (norms too), not differences.
    Case("llama", "full", rank=0, scale=0.0, num_layers=1, fine_tune_type="full"),
    # tied output and biased q/k/v.
    Case(
        "qwen2",
        "lora-tied",
        rank=2,
        scale=20.0,
        num_layers=-1,
        keys=["self_attn.q_proj", "self_attn.v_proj", "model.embed_tokens"],
    ),
    Case(
        "qwen2",
        "dora-tied",
        rank=2,
        scale=20.0,
        num_layers=-1,
        fine_tune_type="dora",
        keys=["self_attn.q_proj", "model.embed_tokens"],
    ),
    Case("mixtral", "lora", rank=2, scale=20.0, num_layers=1),
    Case(
        "qwen3_moe",
        "lora-switch",
        rank=2,
        scale=5.0,
        num_layers=-1,
        keys=["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"],
    ),
    # no switch_mlp; on the disk experts are (E, in, out), and rows of gate and up alternate.
    Case(
        "gpt_oss",
        "lora-experts",
        rank=2,
        scale=5.0,
        num_layers=-1,
        keys=["mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"],
    ),
]


class Tokens:
    """Token sequences as mlx-lm's trainer wants them."""

    def __init__(self, vocab: int, rng: np.random.Generator) -> None:
        self._rows: list[list[int]] = [rng.integers(1, vocab, size=16).tolist() for _ in range(8)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[int]:
        return self._rows[index]

    def process(self, row: list[int]) -> tuple[list[int], int]:
        return row, 0


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this config as the hub stores it (one matrix per expert)."""
    h, v, kind = config["hidden_size"], config["vocab_size"], config["model_type"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim", h // heads)
    inner = config["intermediate_size"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (v, h)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        out[f"{p}.input_layernorm.weight"] = out[f"{p}.post_attention_layernorm.weight"] = (h,)
        for n, width in (("q", heads * d), ("k", kv * d), ("v", kv * d)):
            out[f"{p}.self_attn.{n}_proj.weight"] = (width, h)
            if kind == "qwen2":
                out[f"{p}.self_attn.{n}_proj.bias"] = (width,)
        out[f"{p}.self_attn.o_proj.weight"] = (h, heads * d)
        gate, up, down = (inner, h), (inner, h), (h, inner)
        if kind == "gpt_oss":
            count = config["num_local_experts"]
            out[f"{p}.self_attn.sinks"] = (heads,)
            for n, width in (("q", heads * d), ("k", kv * d), ("v", kv * d), ("o", h)):
                out[f"{p}.self_attn.{n}_proj.bias"] = (width,)
            out[f"{p}.mlp.router.weight"], out[f"{p}.mlp.router.bias"] = (count, h), (count,)
            for n, width, size in (("gate_up_proj", h, 2 * inner), ("down_proj", inner, h)):
                out[f"{p}.mlp.experts.{n}"], out[f"{p}.mlp.experts.{n}_bias"] = (count, width, size), (count, size)
        elif kind == "mixtral":
            out[f"{p}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], h)
            for e in range(config["num_local_experts"]):
                for n, shape in (("w1", gate), ("w2", down), ("w3", up)):
                    out[f"{p}.block_sparse_moe.experts.{e}.{n}.weight"] = shape
        elif kind == "qwen3_moe":
            out[f"{p}.self_attn.q_norm.weight"] = out[f"{p}.self_attn.k_norm.weight"] = (d,)
            out[f"{p}.mlp.gate.weight"] = (config["num_experts"], h)
            for e in range(config["num_experts"]):
                for n, shape in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                    out[f"{p}.mlp.experts.{e}.{n}.weight"] = shape
        else:
            for n, shape in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                out[f"{p}.mlp.{n}.weight"] = shape
    return out


def make_base(name: str) -> None:
    """Writes ``<name>/base``: config.json and a seeded float32 model.safetensors in HF layout."""
    rng = np.random.default_rng(sum(name.encode()))
    tensors: Tensors = {}
    for key, shape in sorted(hf_shapes(CONFIGS[name]).items()):
        noise = rng.standard_normal(shape)
        tensors[key] = (1.0 + 0.1 * noise if "norm" in key else 0.2 * noise).astype(np.float32)
    folder = HERE / name / "base"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2, sort_keys=True) + "\n")


def mlx_base(name: str) -> Path:
    """The base for mlx-lm: of gpt-oss it reads codes of the hub's release or its own names, and no plain stacks."""
    folder = HERE / name / "base"
    if name != "gpt_oss":
        return folder
    tensors: Tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        stem, _, leaf = key.partition(".mlp.experts.")
        if leaf:
            tensors |= {f"{stem}.mlp.experts.{part}": turned for part, turned in stack_parts(leaf, value).items()}
        else:
            tensors[key] = value
    other = Path(mkdtemp())
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", other)
    return other


def stack_parts(leaf: str, value: np.ndarray) -> Tensors:
    """A stack of gpt-oss as mlx-lm has it."""
    turned = value if leaf.endswith("_bias") else np.ascontiguousarray(value.swapaxes(1, 2))
    kind = "bias" if leaf.endswith("_bias") else "weight"
    if leaf.startswith("gate_up_proj"):
        parts = {"gate_proj": turned[:, ::2], "up_proj": turned[:, 1::2]}
        return {f"{part}.{kind}": np.ascontiguousarray(of) for part, of in parts.items()}
    return {f"down_proj.{kind}": turned}


def stacked_again(parts: Tensors) -> Tensors:
    """Parameters with mlx-lm's names for gpt-oss under those of the checkpoint."""
    out: Tensors = {}
    for name, value in parts.items():
        stem, _, leaf = name.partition(".mlp.experts.")
        part, _, kind = leaf.partition(".")
        end = "_bias" if kind == "bias" else ""
        if not leaf:
            out[name] = value
        elif part == "gate_proj":
            up = parts[name.replace("gate_proj", "up_proj")]
            both = np.stack([value, up], axis=2).reshape(len(value), -1, *value.shape[2:])
            out[f"{stem}.mlp.experts.gate_up_proj{end}"] = both if end else np.ascontiguousarray(both.swapaxes(1, 2))
        elif part == "down_proj":
            out[f"{stem}.mlp.experts.down_proj{end}"] = value if end else np.ascontiguousarray(value.swapaxes(1, 2))
    return out


def hf_names(name: str, value: np.ndarray) -> Tensors:
    """One mlx-lm parameter under the names of the checkpoint: stacked experts become one matrix each."""
    found = re.fullmatch(r"(.*)\.switch_mlp\.(gate|up|down)_proj\.weight", name)
    if found is None:
        return {name: value}
    stem, part = found.groups()
    leaf = {"gate": "w1", "down": "w2", "up": "w3"}[part] if stem.endswith("block_sparse_moe") else f"{part}_proj"
    return {f"{stem}.experts.{e}.{leaf}.weight": np.ascontiguousarray(value[e]) for e in range(value.shape[0])}


def fused(base: Path, adapter: Path) -> Tensors:
    """The base with the adapter fused by mlx-lm, HF names."""
    model, _ = load_model(base, lazy=False, strict=True)
    load_adapters(model, str(adapter))
    parts = [(n, m.fuse(dequantize=False)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    if parts:
        model.update_modules(tree_unflatten(parts))
    out: Tensors = {}
    for name, value in tree_flatten(model.parameters()):
        out.update(hf_names(name, np.array(value.astype(mx.float32))))
    return stacked_again(out)


def formula(base: Tensors, adapter: Tensors, scale: float) -> Tensors:
    """The same by the documented equations, float64, from the files alone."""
    out: Tensors = {}
    for key in (k for k in adapter if k.endswith(".lora_a")):
        module = key.removesuffix(".lora_a")
        a, b = adapter[key].astype(np.float64), adapter[f"{module}.lora_b"].astype(np.float64)
        if a.ndim == 3:  # experts: a (E, r, in), b (E, out, r), not transposed
            delta = scale * b @ a
        elif module.endswith("embed_tokens"):  # a (num, r), b (r, dim)
            delta = scale * a @ b
        else:  # a (in, r), b (r, out)
            delta = scale * (a @ b).T
        if ".mlp.experts." in module:
            stem, _, leaf = module.rpartition(".")
            name = f"{stem}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
            new = out.setdefault(name, base[name].astype(np.float64))
            columns = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}.get(leaf, slice(None))
            new[:, :, columns] += delta.swapaxes(1, 2)
            continue
        for name, part in hf_names(f"{module}.weight", delta).items():
            new = base[name].astype(np.float64) + part
            if (m := adapter.get(f"{module}.m")) is not None:  # magnitude per row, norm over the columns
                new *= (m.astype(np.float64) / np.linalg.norm(new, axis=1))[:, None]
            out[name] = new
    return out


def make_case(case: Case) -> None:
    """Trains one adapter with mlx-lm's own ``train_model``, fuses it and stores what changed."""
    folder = HERE / case.base / case.name
    base_folder = HERE / case.base / "base"
    parameters = {"rank": case.rank, "dropout": 0.0, "scale": case.scale} | ({"keys": case.keys} if case.keys else {})
    args = SimpleNamespace(
        **CONFIG_DEFAULTS
        | {
            "model": f"{case.base}/base",
            "adapter_path": f"{case.base}/{case.name}",
            "train": True,
            "data": "random",
        }
        | {
            "fine_tune_type": case.fine_tune_type,
            "num_layers": case.num_layers,
            "lora_parameters": parameters,
        }
        | {"iters": 6, "learning_rate": 0.02, "max_seq_length": 64, "steps_per_eval": 1000}
    )
    np.random.seed(args.seed)
    model, _ = load_model(mlx_base(case.base), lazy=False, strict=True)
    tokens = Tokens(CONFIGS[case.base]["vocab_size"], np.random.default_rng(args.seed))
    train_model(args, model, tokens, [])

    base, adapter = load_file(base_folder / "model.safetensors"), load_file(folder / "adapters.safetensors")
    new = fused(mlx_base(case.base), folder)
    if set(new) != set(base):
        sys.exit(f"{folder}: names differ: {sorted(set(new) ^ set(base))}")
    changed = {k: v for k, v in new.items() if not np.array_equal(v, base[k])}
    wanted = adapter if case.fine_tune_type == "full" else formula(base, adapter, case.scale)
    if case.fine_tune_type == "full":
        wanted = {k: v for k, v in wanted.items() if not np.array_equal(v, base[k])}
    if set(wanted) != set(changed):
        sys.exit(f"{folder}: changed {sorted(changed)}, formula says {sorted(wanted)}")
    worst = 0.0
    for name, value in changed.items():
        step = np.abs(wanted[name] - base[name].astype(np.float64)).max()
        worst = max(worst, float(np.abs(value - wanted[name]).max() / step))
    if worst > 1e-6:
        sys.exit(f"{folder}: fuse and formula differ by {worst:.2e} of max|delta|")
    save_file(changed, folder / "expected.safetensors", metadata={"format": "pt"})
    print(f"{case.base}/{case.name}: {len(adapter)} tensors, {len(changed)} changed, fuse/formula {worst:.1e}")


def make_npz() -> None:
    """Stores ``lora-zero`` as mlx-lm did before 2024-04 and mlx-examples does: an archive, and no configuration."""
    folder = HERE / "llama/npz"
    folder.mkdir(exist_ok=True)
    mx.savez(str(folder / "adapters.npz"), **mx.load(str(HERE / "llama/lora-zero/adapters.safetensors")))


def main() -> None:
    """Makes everything anew, or the bases that are named."""
    mx.set_default_device(mx.cpu)
    names = sys.argv[1:] or list(CONFIGS)
    for name in names:
        shutil.rmtree(HERE / name, ignore_errors=True)
        make_base(name)
    for case in CASES:
        if case.base in names:
            make_case(case)
    if "llama" in names:
        make_npz()
    packages = ("mlx", "mlx-lm", "numpy", "safetensors")
    (HERE / "versions.json").write_text(json.dumps({p: version(p) for p in packages}, indent=2) + "\n")


if __name__ == "__main__":
    main()
