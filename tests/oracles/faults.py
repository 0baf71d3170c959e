# SPDX-License-Identifier: Apache-2.0
"""Adapters (and bases) with one fault each, which a merge must refuse: the exit code, and what the message must name.

Codes: 3 where a file is wrong by itself (unreadable, inconsistent, not a number), 4 where it does not fit this base, would lose
something, or would change nothing. Two codes are given where both readings are fair; the first is the better one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles import disk, hostile, models, peft_oracle
from tests.oracles.cases import Config, Tensors

__all__ = ["FAULTS", "MARKER", "Fault", "fault", "good"]

MARKER = hostile.MARKER
PREFIX = "base_model.model.model.layers"
Q0 = f"{PREFIX}.0.self_attn.q_proj"
Make = Callable[[Path, Path, Path], tuple[Path, Path]]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: of the fault.
        make: ``make(base, adapter, folder)`` writes under ``folder`` and returns the base and the adapter to merge; the good ones it
            is given must not be touched.
        exit_codes: accepted, the better first.
        mentions: each must be in the message (file, tensor or config field).
        forbids: none may be in the output (raw control characters).
        seconds: a refusal takes no longer.
    """

    name: str
    make: Make
    exit_codes: tuple[int, ...]
    mentions: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ("Traceback",)
    seconds: float = 20.0

    @property
    def exit_code(self) -> int:
        """The better of the accepted codes."""
        return self.exit_codes[0]


FAULTS: list[Fault] = []


def good(folder: Path, arch: str = "llama", **config: Any) -> tuple[Path, Path]:
    """A sound tiny base and a sound adapter for it: LoRA on q, v, up and down, float32."""
    base = models.build_base(arch, folder / "base")
    fields = {"r": 4, "lora_alpha": 6, "target_modules": list(models.ARCHS[arch].targets), **config}
    peft_oracle.train(arch, base, "LoraConfig", fields, folder / "adapter", seed=5)
    disk.write_adapter(folder / "adapter", *disk.adapter(folder / "adapter"))
    return base, folder / "adapter"


def fault(name: str, codes: int | tuple[int, ...], *mentions: str, **more: Any) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        FAULTS.append(Fault(name, make, codes if isinstance(codes, tuple) else (codes,), mentions, **more))
        return make

    return register


def _change(
    name: str, codes: int | tuple[int, ...], *mentions: str, **more: Any
) -> Callable[[Callable[[Config, Tensors], Any]], None]:
    """A fault made by changing the config and the tensors of the good adapter in place."""

    def register(change: Callable[[Config, Tensors], Any]) -> None:
        def make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
            config, tensors = disk.adapter(adapter)
            change(config, tensors)
            return base, disk.write_adapter(folder / "bad", config, tensors)

        fault(name, codes, *mentions, **more)(make)

    return register


def _set(tensors: Tensors, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor whose name ends with ``suffix``."""
    hits = [k for k in tensors if k.endswith(suffix)]
    if not hits:
        raise KeyError(suffix)
    for key in hits:
        tensors[key] = change(tensors[key])


def _rename(tensors: Tensors, old: str, new: str) -> None:
    for key in [k for k in tensors if old in k]:
        tensors[key.replace(old, new, 1)] = tensors.pop(key)


def _keep(tensors: Tensors, test: Callable[[str], bool]) -> None:
    for key in [k for k in tensors if not test(k)]:
        del tensors[key]


def _poke(value: float) -> Callable[[Tensor], Tensor]:
    def poke(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return poke


# --- keys ---------------------------------------------------------------------------------------------------------------------
_change("no-key-matches", 4, "encoder.blocks")(lambda c, t: _rename(t, "model.layers", "encoder.blocks"))
_change("one-module-unknown", 4, "layers.0.self_attn.frob_proj")(
    lambda c, t: _rename(t, "0.self_attn.q_proj", "0.self_attn.frob_proj")
)
_change("half-lora-b-missing", (3, 4), "layers.1.", "lora_B")(
    lambda c, t: _keep(t, lambda k: "layers.0" in k or "lora_A" in k)
)
_change("only-lora-a", (3, 4), "lora_B")(lambda c, t: _keep(t, lambda k: "lora_A" in k))
_change("only-lora-b", (3, 4), "lora_A")(lambda c, t: _keep(t, lambda k: "lora_B" in k))
_change("layer-beyond-the-base", 4, "layers.7")(
    lambda c, t: t.update({k.replace("layers.1", "layers.7"): v.clone() for k, v in list(t.items()) if "layers.1" in k})
)
_change("unknown-tensor-kind", (3, 4), "lora_frob")(lambda c, t: t.update({f"{Q0}.lora_frob.weight": torch.ones(4)}))
_change("stray-tensor", (4, 3), "stray.thing")(lambda c, t: t.update({"base_model.model.stray.thing": torch.ones(4)}))
_change("module-twice", (3, 4), "q_proj")(
    lambda c, t: t.update(
        {k.replace(".weight", ".default.weight"): 2 * v for k, v in list(t.items()) if "0.self_attn.q_proj" in k}
    )
)
_change("lora-on-a-norm", (4, 3), "layers.0.input_layernorm")(
    lambda c, t: _rename(t, "0.self_attn.q_proj", "0.input_layernorm")
)
_change("no-tensors", (4, 3))(lambda c, t: t.clear())
_change("escape-in-a-name", (4, 3), "frob", forbids=("\x1b", "Traceback"))(
    lambda c, t: t.update({"base_model.model.\x1b[31mfrob\x1b[2J": torch.ones(2)})
)


# --- values and shapes --------------------------------------------------------------------------------------------------------
_change("nan", (3, 4), "layers.0.self_attn.q_proj")(
    lambda c, t: _set(t, "0.self_attn.q_proj.lora_A.weight", _poke(float("nan")))
)
_change("inf", (3, 4), "layers.1.mlp.down_proj")(
    lambda c, t: _set(t, "1.mlp.down_proj.lora_B.weight", _poke(float("inf")))
)
_change("zero-delta", 4)(lambda c, t: _set(t, "lora_B.weight", torch.zeros_like))
_change("rank-mismatch", (3, 4), "layers.0.self_attn.q_proj")(
    lambda c, t: _set(t, "0.self_attn.q_proj.lora_B.weight", lambda b: torch.randn(32, 5))
)
_change("input-width-mismatch", 4, "layers.0.self_attn.q_proj")(
    lambda c, t: _set(t, "0.self_attn.q_proj.lora_A.weight", lambda a: torch.randn(4, 33))
)
_change("output-width-mismatch", 4, "layers.1.mlp.up_proj")(
    lambda c, t: _set(t, "1.mlp.up_proj.lora_B.weight", lambda b: torch.randn(57, 4))
)
_change("factors-transposed", (4, 3), "layers.1.mlp.up_proj")(
    lambda c, t: _set(t, "1.mlp.up_proj.lora_A.weight", lambda a: a.t().contiguous())
)
_change("factor-is-a-vector", (3, 4), "q_proj")(lambda c, t: _set(t, "q_proj.lora_A.weight", lambda a: a.flatten()))
_change("factor-has-rank-zero", (3, 4), "v_proj")(
    lambda c, t: (_set(t, "v_proj.lora_A.weight", lambda a: a[:0]), _set(t, "v_proj.lora_B.weight", lambda b: b[:, :0]))
)
_change("int8-factors", (3, 4), "lora_A")(lambda c, t: _set(t, "lora_A.weight", lambda a: (a * 100).to(torch.int8)))


@fault("other-width", 4, "adapter_model")
def _other_width(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    return models.build_base("llama", folder / "wide", hidden_size=64, intermediate_size=112), adapter


@fault("fewer-layers", 4, "layers.1")
def _fewer_layers(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    return models.build_base("llama", folder / "short", num_hidden_layers=1), adapter


@fault("other-architecture", 4, "adapter_model")
def _other_architecture(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    return models.build_base("gpt2", folder / "gpt2"), adapter


@fault("fp16-overflow", (4, 3, 5), "q_proj")
def _overflow(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    half = models.build_base("llama", folder / "half", dtype="float16")
    config, tensors = disk.adapter(adapter)
    _set(tensors, "0.self_attn.q_proj.lora_B.weight", lambda b: b * 1e6)
    return half, disk.write_adapter(folder / "bad", config, tensors)


@fault("int8-base-weight", (4, 3), "q_proj")
def _int8_base(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    shutil.copytree(base, folder / "int8")
    tensors = disk.read_tensors(base)
    _set(tensors, "q_proj.weight", lambda w: (w * 100).to(torch.int8))
    disk.write_safetensors(folder / "int8" / "model.safetensors", tensors)
    return folder / "int8", adapter


# --- config -------------------------------------------------------------------------------------------------------------------
def _field(name: str, codes: int | tuple[int, ...], fields: Mapping[str, Any], *mentions: str, **more: Any) -> None:
    _change(name, codes, *(mentions or tuple(fields)), **more)(lambda c, t: c.update(fields))


_field("unknown-peft-type", 3, {"peft_type": "FROBNICATE"}, "FROBNICATE")
_field("peft-type-is-a-list", 3, {"peft_type": ["LORA"]})
# With r and lora_alpha it would be one of Tinker's, which are LoRAs.
_change("peft-type-missing", 3, "peft_type")(lambda c, t: (c.pop("peft_type"), c.pop("r")))
_field("unknown-switch-on", (3, 4), {"use_frobnicate": True})
_field("unknown-config-on", (3, 4), {"frob_config": {"strength": 2}})
_field("rslora-is-a-string", 3, {"use_rslora": "false"})
_field("dora-is-a-number", 3, {"use_dora": 1})
_field("dora-without-vectors", (3, 4), {"use_dora": True})
_change("vectors-without-dora", (3, 4), "lora_magnitude_vector")(
    lambda c, t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)})
)
_change("dora-half-the-vectors", (3, 4), "layers.1.self_attn.v_proj")(
    lambda c, t: (
        c.update(use_dora=True),
        t.update(
            {
                k.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(d)
                for k, d in _widths(t).items()
                if "1.self_attn.v_proj" not in k
            }
        ),
    )
)
_change("dora-vector-too-long", (3, 4), "layers.0.self_attn.q_proj")(
    lambda c, t: (
        c.update(use_dora=True),
        t.update(
            {
                k.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(d + ("0.self_attn.q_proj" in k))
                for k, d in _widths(t).items()
            }
        ),
    )
)
_field("alpha-is-nan", 3, {"lora_alpha": float("nan")}, "adapter_config.json")
_field("alpha-is-a-string", 3, {"lora_alpha": "16"})
_field("alpha-is-a-list", 3, {"lora_alpha": [16]})
_field("alpha-is-a-bool", 3, {"lora_alpha": True})
_field("alpha-pattern-is-nan", 3, {"alpha_pattern": {"q_proj": float("nan")}}, "adapter_config.json")
_field("alpha-pattern-is-a-list", 3, {"alpha_pattern": [1, 2]})
_field("alpha-pattern-value-is-a-string", 3, {"alpha_pattern": {"q_proj": "8"}})
_field("regex-malformed", 3, {"alpha_pattern": {"q_proj(": 3}})
_field("regex-catastrophic", 3, {"alpha_pattern": {r"(?:(.+)+\1*)+(?<!j)": 3}})
_field("regex-catastrophic-backreference", 3, {"alpha_pattern": {r"(?:([a-z_.0-9]+)+\1*)+(?<!j)": 3}})
_field("layer-replication", (4, 3), {"layer_replication": [[0, 2], [1, 2]]})
for _init in ("pissa_niter_4", "corda", "loftq", "lora_ga"):
    _field(f"init-{_init}", (4, 3), {"init_lora_weights": _init}, "init_lora_weights", _init)
_field("alora", (4, 3), {"alora_invocation_tokens": [1, 2, 3]})
_field("arrow", (4, 3), {"arrow_config": {"top_k": 2}})
_field("qalora", (4, 3), {"use_qalora": True})


def _widths(tensors: Tensors) -> dict[str, int]:
    """lora_A key -> output width of its module."""
    return {k: tensors[k.replace("lora_A", "lora_B")].shape[0] for k in tensors if k.endswith("lora_A.weight")}


def _text(name: str, codes: int | tuple[int, ...], edit: Callable[[str], str | bytes], *mentions: str) -> None:
    """A fault made by changing the text of adapter_config.json."""

    @fault(name, codes, "adapter_config.json", *mentions)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        shutil.copytree(adapter, folder / "bad")
        text = edit((adapter / "adapter_config.json").read_text())
        (folder / "bad" / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return base, folder / "bad"


def _alpha(value: str) -> Callable[[str], str]:
    return lambda text: text.replace('"lora_alpha": 6', f'"lora_alpha": {value}')


_text("alpha-is-1e400", 3, _alpha("1e400"))
_text("alpha-is-minus-infinity", 3, _alpha("-Infinity"))
_text("alpha-has-5000-digits", 3, _alpha("9" * 5000))
_text("duplicate-key", 3, _alpha('6, "lora_alpha": 60'), "lora_alpha")
_text("config-cut-off", 3, lambda text: text[: len(text) // 2])
_text("config-is-empty", 3, lambda text: "")
_text("config-is-a-list", 3, lambda text: f"[{text}]")
_text("config-is-nested-deep", 3, lambda text: '{"a":' * 100_000)
_text("config-is-latin-1", 3, lambda text: text.replace('"LORA"', '"L\u00d6RA"').encode("latin-1"))
_text("config-is-huge", 3, lambda text: text + " " * (8 << 20))


# --- adapters with more than LoRA pairs ---------------------------------------------------------------------------------------
def _other_adapter(
    name: str,
    codes: int | tuple[int, ...],
    fields: Mapping[str, Any],
    change: Callable[[Config, Tensors], Any],
    *mentions: str,
) -> None:
    """A fault in an adapter trained with further options."""

    @fault(name, codes, *mentions)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        other, trained = good(folder / "more", **fields)
        config, tensors = disk.adapter(trained)
        change(config, tensors)
        return other, disk.write_adapter(folder / "bad", config, tensors)


_other_adapter(
    "saved-module-of-other-shape",
    4,
    {"modules_to_save": ["lm_head"]},
    lambda c, t: _set(t, "lm_head.weight", lambda w: w[:, :-1]),
    "lm_head",
)
_other_adapter(
    "saved-module-nan",
    (3, 4),
    {"modules_to_save": ["lm_head"]},
    lambda c, t: _set(t, "lm_head.weight", _poke(float("nan"))),
    "lm_head",
)
_other_adapter(
    "magnitude-nan",
    (3, 4),
    {"use_dora": True},
    lambda c, t: _set(t, "0.mlp.up_proj.lora_magnitude_vector", _poke(float("nan"))),
    "layers.0.mlp.up_proj",
)
_TOKENS = {"trainable_token_indices": [3, 5]}
_other_adapter(
    "token-rows-missing",
    (3, 4),
    _TOKENS,
    lambda c, t: _set(t, "trainable_tokens_delta", lambda d: d[:1]),
    "embed_tokens",
)
_other_adapter("token-index-beyond", (4, 3), _TOKENS, lambda c, t: c.update(trainable_token_indices=[3, 9999]), "9999")
_other_adapter("token-index-negative", (3, 4), _TOKENS, lambda c, t: c.update(trainable_token_indices=[3, -1]), "-1")
_other_adapter(
    "token-index-twice",
    (3, 4),
    _TOKENS,
    lambda c, t: c.update(trainable_token_indices=[3, 3]),
    "trainable_token_indices",
)
_other_adapter(
    "token-index-is-a-float",
    (3, 4),
    _TOKENS,
    lambda c, t: c.update(trainable_token_indices=[3, 5.5]),
    "trainable_token_indices",
)
_other_adapter(
    "token-indices-missing", (3, 4), _TOKENS, lambda c, t: c.update(trainable_token_indices=None), "trainable_tokens"
)
_change("bias-the-base-lacks", (4, 3), "q_proj", "bias")(
    lambda c, t: (c.update(lora_bias=True), t.update({f"{Q0}.lora_B.bias": torch.ones(32)}))
)
_change("replaced-bias-the-base-lacks", (4, 3), "q_proj", "bias")(
    lambda c, t: (c.update(bias="lora_only"), t.update({f"{Q0}.base_layer.bias": torch.ones(32)}))
)


@fault("expert-factors-do-not-divide", (3, 4), "experts")
def _experts(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    fields = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    other, trained = good(folder / "more", "mixtral", **fields)
    config, tensors = disk.adapter(trained)
    for key in list(tensors):
        tensors[key] = tensors[key][:-1].clone() if "lora_A" in key else tensors[key][:, :-1].clone()
    return other, disk.write_adapter(folder / "bad", config, tensors)


from tests.oracles import faults_files as _files  # noqa: E402, F401  (registers more)
from tests.oracles import faults_kinds as _kinds  # noqa: E402, F401
