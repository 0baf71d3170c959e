# SPDX-License-Identifier: Apache-2.0
"""What each field of a PEFT configuration does to the meaning of the tensors, per kind (PEFT 0.21, ``*Config`` classes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["NOT_READ", "PROMPT_KINDS", "SWITCHES", "Switches"]


@dataclass(frozen=True, slots=True)
class Switches:
    """Fields of one kind's configuration; one that is on and not here is refused.

    Attributes:
        harmless: Without any effect on what the stored tensors mean: training, targets, initial values.
        understood: Read.
        refused: Change the arithmetic in a way no merged weight can have, or that the stored tensors alone cannot reproduce; and why.
    """

    harmless: frozenset[str]
    understood: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)


_COMMON = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "runtime_config",
        "inference",
        "init_weights",
        "fan_in_fan_out",  # PEFT overrides it by the type of the module; the base's family decides here
    ]
)
_LORA = Switches(
    harmless=_COMMON
    | {
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "token_indices",
        "enable_lora",
        "merge_weights",
        "ensure_weight_tying",
    },
    understood=frozenset(
        [
            "r",
            "lora_alpha",
            "bias",
            "use_rslora",
            "modules_to_save",
            "init_lora_weights",
            "rank_pattern",
            "alpha_pattern",
            "trainable_token_indices",
            "use_dora",
            "lora_bias",
            "target_parameters",
        ]
    ),
    refused={
        "layer_replication": "its layers are copies of the base's layers: no single weight can hold them",
        "alora_invocation_tokens": "it acts only after its invocation tokens: no merged weight does that",
        "arrow_config": "it routes between adapters at run time",
        "use_qalora": "its A acts on pooled inputs",
        "use_bdlora": "block-diagonal LoRA is not read yet",
        "kasa_config": "KaSA is not read yet",
        "velora_config": "VeLoRA is not read yet",
        "monteclora_config": "MonteCLoRA is not read yet",
        "megatron_config": "its tensors are one part of a parallel layer",
        "corda_config": "raw CorDA changes the base in a way its files do not record; convert it with PEFT first",
        "lora_ga_config": "raw LoRA-GA changes the base in a way its files do not record; convert it with PEFT first",
    },
)
_PROMPT = Switches(
    harmless=_COMMON
    | {
        "encoder_reparameterization_type",  # what is stored is what the encoder, or the projection, made
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
        "num_frozen_tokens",
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    },
    understood=frozenset(
        [
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
            "modules_to_save",
        ]
    ),
)
PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_LYCORIS = _COMMON | {"rank_dropout", "module_dropout", "use_effective_conv2d"}
_LYCORIS_READ = frozenset(["r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"])

SWITCHES: Mapping[str, Switches] = {
    "LORA": _LORA,
    "TRAINABLE_TOKENS": _LORA,
    "IA3": Switches(_COMMON | {"init_ia3_weights"}, frozenset(["feedforward_modules", "modules_to_save"])),
    "LOHA": Switches(_LYCORIS, _LYCORIS_READ),
    "LOKR": Switches(_LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"}, _LYCORIS_READ),
    "OFT": Switches(
        _COMMON | {"r", "oft_block_size", "module_dropout"},  # the sizes are the tensors'
        frozenset(
            ["bias", "modules_to_save", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"]
        ),
    ),
    "VERA": Switches(
        _COMMON | {"vera_dropout", "d_initial"},
        frozenset(["r", "bias", "modules_to_save", "projection_prng_key", "save_projection"]),
    ),
    "LN_TUNING": Switches(_COMMON, frozenset(["modules_to_save"])),
    **dict.fromkeys(PROMPT_KINDS, _PROMPT),
}

NOT_READ: Mapping[str, str] = {
    "ADAPTION_PROMPT": "its gates act inside attention: neither a weight nor a prefix can hold them",
    "MULTITASK_PROMPT_TUNING": "it holds one prompt per task and the task is chosen at run time",
    "XLORA": "it routes between adapters at run time",
    "POLY": "it routes between adapters at run time",
    "LILY": "it routes between adapters at run time",
}
"""Kinds that are known and refused, and why."""
