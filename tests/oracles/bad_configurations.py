# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with configurations, as texts and field by field: more of `tests.oracles.bad_inputs`."""

from __future__ import annotations

from tests.oracles.bad_inputs import FILES, HUGE, SETTINGS, TEXTS, add, at, config, text

__all__: list[str] = []


for _name, _edit in TEXTS.items():
    add(f"base-config-{_name}", "base", text("config.json", _edit), 3, "config.json", some=4)
    add(f"lora-config-{_name}", "lora", text(SETTINGS, _edit), 3, "adapter_config.json", some=4)
    add(f"prompt-config-{_name}", "prompt", text(SETTINGS, _edit), 3, "adapter_config.json", some=2)
for _name in ("fifo", "folder", "loop", "dangling", "device", "noise"):
    add(f"base-config-is-{_name}", "base", at("config.json", FILES[_name]), 3, "config.json", some=3)
    add(f"lora-config-is-{_name}", "lora", at(SETTINGS, FILES[_name]), (3, 4), "adapter_", some=3)
for _field, _value in {
    "hidden_size": "16", "num_hidden_layers": 1_000_000_000, "num_attention_heads": -2, "head_dim": 0, "vocab_size": HUGE,
    "rms_norm_eps": "small", "rope_theta": 0, "max_position_embeddings": -1, "hidden_act": "frob", "model_type": "frob",
    "num_key_value_heads": 3, "intermediate_size": 1 << 62, "rope_scaling": {"rope_type": "frob"}, "rope_parameters": [1],
}.items():  # fmt: skip
    add(
        f"base-{_field}-is-{_value}"[:60],
        "base",
        config("config.json", **{_field: _value}),
        (3, 4),
        "config.json",
        only="export-onnx",
        some=2,
    )
for _field, _value in {
    "r": "2", "lora_alpha": 1e300, "peft_type": "FROB", "use_rslora": "false", "use_dora": True, "alpha_pattern": {"q(": 3},
    "rank_pattern": {"q_proj": HUGE}, "modules_to_save": 5, "layer_replication": [[0, 2]],
    "target_parameters": {"a": 1}, "use_frob": True,
}.items():  # fmt: skip
    add(f"lora-{_field}-is-{_value}"[:60], "lora", config(SETTINGS, **{_field: _value}), (3, 4), "adapter_", some=3)
add(
    "lora-regex",
    "lora",
    config(SETTINGS, alpha_pattern={r"(?:([a-z_.0-9]+)+\1*)+(?<!j)": 3}),
    3,
    "alpha_pattern",
    some=3,
)
for _field, _value in {
    "num_virtual_tokens": 4,
    "token_dim": "16",
    "peft_type": "FROB",
    "num_transformer_submodules": HUGE,
}.items():
    add(f"prompt-{_field}-is-{_value}"[:60], "prompt", config(SETTINGS, **{_field: _value}), (3, 4), "prompt", some=4)
