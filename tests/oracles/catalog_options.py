# SPDX-License-Identifier: Apache-2.0
"""Every kind of PEFT with the layers that it is for, and each option that changes the weight: the table of a generated test."""

from __future__ import annotations

from collections.abc import Iterator

import peft

from tests.oracles.option_walks import ALL, CONV1D, CONVOLUTIONS, EXPERTS, LINEAR, Fields, Walk, biased, products

__all__ = ["CASES", "KINDS", "NOT_INSTALLED"]

LORA_RANKS = {
    "rank_pattern": {"square": 2, "wide": 3, "conv2": 2, "embed": 3, "attention": 2, "c_fc": 2},
    "alpha_pattern": {"tall": 3, "conv1": 5, "embed": 7, "attention": 5, "c_attn": 1},
}
DRAWN = {"drawn": {"save_projection": False}, "by a seed": {"save_projection": False, "projection_prng_key": 7}}
NO_PLACE, NO_CONVOLUTION = "has no parameter 'tall.bias': attached", "on a convolution with a kernel"
WAVELETS = ("db2", "db4", "db10", "sym2", "sym7", "coif1", "coif2")
ACTIVATIONS = (
    *("relu", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "linear", "mish", "relu6", "relu2", "gelu_new"),
    *("quick_gelu", "swish", "gelu_10", "gelu_accurate", "gelu_python_tanh", "hardswish", "laplace", "sqrtsoftplus"),
)
KINDS: dict[str, Walk] = {
    "LORA": Walk(
        {"r": 4, "lora_alpha": 6},
        {
            "": {},
            **biased("lora"),
            "gaussian": {"init_lora_weights": "gaussian"},
            "rslora": {"use_rslora": True},
            "ranks": LORA_RANKS,
        },
        (LINEAR, *CONVOLUTIONS, "embed", "attention", CONV1D),
        {
            LINEAR: {
                "lora_bias": {"lora_bias": True},
                "dora": {"use_dora": True},
                "dora, rslora": {"use_dora": True, "use_rslora": True, **LORA_RANKS},
                "tokens": {"trainable_token_indices": {"embed": [1, 3]}},
                "dora, tokens": {"trainable_token_indices": {"embed": [1, 3]}, "use_dora": True},
                "pissa": {"init_lora_weights": "pissa"},
                "pissa by iterations": {"init_lora_weights": "pissa_niter_4"},
                "olora": {"init_lora_weights": "olora"},
                "mica": {"init_lora_weights": "mica"},
                "orthogonal": {"init_lora_weights": "orthogonal"},
                "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
                "velora": {"velora_config": {"num_groups": 4, "scale": 1.0}},
                "monteclora": {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
                "kasa": {"kasa_config": peft.KasaConfig()},
                "blocks": {
                    "use_bdlora": peft.BdLoraConfig(
                        target_modules_bd_a=["wide"], target_modules_bd_b=["square", "tall"], nblocks=2
                    )
                },
                "invocation": {"alora_invocation_tokens": [1, 2]},
                "qalora": {"use_qalora": True, "qalora_group_size": 4},
            },
            "square": {"lora_bias": {"lora_bias": True}},
            **{layer: {"dora": {"use_dora": True}} for layer in ("conv1", "conv2", "point", "conv3", "embed", CONV1D)},
            "conv2": {"lora_bias": {"lora_bias": True}, "dora": {"use_dora": True}},
            "attention": {"lora_bias": {"lora_bias": True}},
            CONV1D: {
                "lora_bias": {"lora_bias": True},
                "dora": {"use_dora": True},
                "pissa": {"init_lora_weights": "pissa"},
                "mica": {"init_lora_weights": "mica"},
            },
            "embed": {"mica": {"init_lora_weights": "mica"}, "dora": {"use_dora": True}},
            EXPERTS: {
                "": {},
                "one rank": {"r": 1},
                "rslora": {"use_rslora": True},
                "beside modules": {"target_modules": ["q_proj"]},
                "ranks": {
                    "rank_pattern": {"mlp.experts.down_proj": 2},
                    "alpha_pattern": {"mlp.experts.gate_up_proj": 3},
                },
            },
        },
        {
            f"{LINEAR} lora_bias": NO_PLACE,
            "pissa by iterations": "random numbers without a seed",
            "invocation": "only after its invocation tokens",
            "qalora": "inputs that were pooled",
            "grouped": "convolution in 2 groups",
        },
        frozenset(["pissa", "pissa by iterations", "olora", "mica"]),
        # refused by the configuration alone (tests/oracles/faults.py)
        frozenset(["arrow_config", "corda_config", "layer_replication", "lora_ga_config", "megatron_config"]),
    ),
    "ADALORA": Walk(
        {"init_r": 4, "lora_alpha": 6, "total_step": 10},
        {
            "": {},
            **biased("lora"),
            "rslora": {"use_rslora": True},
            "no alpha": {"lora_alpha": 0},
            "negative": {"lora_alpha": -4},
            "alphas": {"alpha_pattern": {"square": 3}},
        },
        (LINEAR, "conv2", "point", CONV1D),
        {LINEAR: {"tokens": {"trainable_token_indices": {"embed": [1, 3]}}}},
        # rank_pattern is what training pruned (tests/oracles/catalog_peft_kinds.py)
        untried=frozenset(
            [
                *("alora_invocation_tokens", "arrow_config", "corda_config", "layer_replication", "lora_ga_config"),
                *("megatron_config", "use_qalora", "rank_pattern"),
            ]
        ),
    ),
    "BOFT": Walk(
        {"boft_block_size": 4},
        {
            "": {},
            **biased("boft"),
            "blocks of 8": {"boft_block_size": 8},
            "two blocks": {"boft_block_size": 0, "boft_block_num": 2},
            "two factors": {"boft_n_butterfly_factor": 2},
        },
        (LINEAR, "point"),
        {"conv2": {"blocks of 3": {"boft_block_size": 3}}},
    ),
    "HRA": Walk(
        {"r": 4},
        {"": {}, **biased("hra"), "one": {"r": 1}, "odd": {"r": 3}, **products(apply_GS=(True,), r=(2, 3, 8))},
        (LINEAR, "conv2", "point"),
    ),
    "HIRA": Walk(
        {"r": 3},
        {"": {}, "ranks": {"rank_pattern": {"square": 2}}},
        (LINEAR, "conv1", "conv2", "point", "conv3", "embed", CONV1D),
    ),
    "MISS": Walk(
        {"r": 4},
        {
            "": {},
            **biased("MiSS"),
            "padded": {"r": 5},
            "whole": {"r": 16},
            "off": {"init_weights": False},
            "bat": {"init_weights": "bat", "r": 8},
            "mini": {"init_weights": "mini", "mini_r": 2},
            "mini of eight": {"init_weights": "mini", "mini_r": 8},
        },
    ),
    "RANDLORA": Walk(
        {"r": 5, "randlora_alpha": 3},
        {
            "": {},
            **biased("randlora"),
            "sparse": {"sparse": True},
            "very sparse": {"very_sparse": True},
            "sparse, drawn": {"sparse": True, "save_projection": False, "projection_prng_key": 7},
            "very sparse, drawn": {"very_sparse": True, "save_projection": False},
            "drawn": {"save_projection": False},
            "wide": {"r": 40},
        },
        (LINEAR, CONV1D),
        refused={"drawn": "draws them in half precision"},
    ),
    "C3A": Walk(
        {"block_size": 8},
        {"": {}, **biased("c3a"), **products(block_size=(1, 4)), "sizes": {"block_size_pattern": {"wide": 4}}},
    ),
    "FOURIERFT": Walk(
        {"n_frequency": 30},
        {
            "": {},
            **biased("fourier"),
            "scale": {"scaling": 7.0},
            "seed": {"random_loc_seed": 5},
            "counts": {"n_frequency_pattern": {"wide": 7}},
        },
        (LINEAR, CONV1D),
    ),
    "WAVEFT": Walk(
        {"n_frequency": 30},
        {
            "": {},
            **biased("waveft"),
            "scale": {"scaling": 7.0},
            "seed": {"random_loc_seed": 5},
            "counts": {"n_frequency_pattern": {"wide": 7}},
            "in proportion": {"proportional_parameters": True},
            "elements": {"use_idwt": False},
            **products(wavelet_family=WAVELETS),
        },
        (LINEAR, CONV1D),
    ),
    "SHIRA": Walk({"r": 2}, {"": {}, "one": {"r": 1}, "seed": {"random_seed": 3}}),
    "ROAD": Walk({"group_size": 8}, products(variant=("road_1", "road_2", "road_4"), group_size=(4, 8))),
    "DELORA": Walk(
        {"r": 3},
        {
            "": {},
            **biased("delora"),
            "lambda": {"delora_lambda": 3},
            "patterns": {"rank_pattern": {"wide": 2}, "lambda_pattern": {"tall": 3}},
        },
    ),
    "GRALORA": Walk(
        {"r": 4, "gralora_k": 2},
        {"": {}, **biased("gralora"), **products(gralora_k=(1, 4)), "hybrid": {"hybrid_r": 3}, "alpha": {"alpha": 5}},
        (LINEAR, CONV1D),
    ),
    "GLORA": Walk(
        {"r": 3},
        {
            **biased("glora"),
            **products(
                config_A_B=("lora", "vector", "constant"),
                config_C=("lora", "vector", "none"),
                config_D_E=("constant", "vector"),
            ),
            "biases": {"config_A_B": "none"},
            "weights": {"config_C": "none", "config_D_E": "none"},
        },
        untried=frozenset(["r"]),
    ),
    "DEFT": Walk(
        {"r": 3},
        {
            **biased("deft"),
            **products(decomposition_method=("relu", "qr"), para=(False, True)),
            **products(decomposition_method=("relu", "qr"), alpha=(5,)),
            **products(r=(1, 16)),
        },
        (LINEAR, CONV1D),
    ),
    "OSF": Walk(
        {}, {"": {}, **products(effective_rank=(3, 0.5)), "ranks": {"rank_pattern": {"wide": 2, "tall": 0.25}}}
    ),
    "FROD": Walk(
        {"progressbar": False, "sparse_rate": 0.05},
        {
            "": {},
            **biased("frod"),
            "half": {"sparse_rate": 0.5},
            "beside": {"runtime_offload_base_weight": True},
            "drawn": {"save_projection": False},
        },
        (LINEAR, CONV1D),
        refused={"drawn": "save_projection is off"},
    ),
    "PVERA": Walk(
        {"r": 4},
        {"": {}, **biased("pvera"), **DRAWN, "at random": {"sample_at_inference": True, "generator_seed": 3}},
        (LINEAR, CONV1D),
    ),
    "VERA": Walk({"r": 4}, {"": {}, **biased("vera"), **DRAWN}, (LINEAR, CONV1D)),
    "TINYLORA": Walk(
        {"r": 2, "u": 6},
        {
            **biased("tinylora"),
            **products(r=(1, 2, 3), u=(1, 6), weight_tying=(0.0, 0.5, 1.0)),
            "seed": {"projection_seed": 3},
            "drawn": {"save_projection": False},
        },
        (LINEAR, "embed,square", CONV1D),
        refused={"drawn": "save_projection is off"},
    ),
    "PEANUT": Walk(
        {"r": 3}, {**products(act_fn=ACTIVATIONS), **products(act_fn=("relu", "gelu"), depth=(1, 3), scaling=(0.7,))}
    ),
    "UNILORA": Walk(
        {"r": 3, "theta_d_length": 50, "save_indices": True},
        {
            "": {},
            **biased("unilora"),
            "seed": {"proj_seed": 3},
            "long": {"theta_d_length": 500},
            "drawn": {"save_indices": False},
        },
        (LINEAR, CONV1D),
        refused={"drawn": "'save_indices' is off"},
    ),
    "VBLORA": Walk(
        {"r": 2, "num_vectors": 9, "vector_length": 8},
        {**biased("vblora"), **products(topk=(1, 2, 3), save_only_topk_weights=(False, True)), "all": {"topk": 9}},
        (LINEAR, CONV1D),
    ),
    "BEFT": Walk({}, {"": {}}, ("square,wide", "tall"), refused={"tall": NO_PLACE}),
    "LILY": Walk({"r": 3}, {"": {}}, refused={LINEAR: "a router mixes"}),
    "PSOFT": Walk({"r": 3}, {"": {}}, refused={LINEAR: "signs are those"}, half=frozenset([""])),
    "SUPERTUNING": Walk(
        {"sparsity": 0.9},
        {
            "": {},
            "smallest": {"select_top": False},
            "half": {"sparsity": 0.5},
            "lora": {"r": 3, "lora_alpha": 5},
            "drawn": {"save_precomputed_indices": False},
        },
        refused={"drawn": "save_precomputed_indices is off"},
    ),
    "IA3": Walk(
        {},
        {"outputs": {"feedforward_modules": []}},
        (LINEAR, *CONVOLUTIONS[1:], CONV1D),
        {
            layer: {"inputs": {"feedforward_modules": layer.split(",")[-2:]}}
            for layer in (LINEAR, "conv2", "point", "conv3", CONV1D)
        },
    ),
    "LOHA": Walk(
        {"r": 3, "alpha": 5},
        {
            "": {},
            "kernels apart": {"use_effective_conv2d": True},
            "patterns": {"rank_pattern": {"square": 2}, "alpha_pattern": {"wide": 3}},
            **products(r=(1, 20)),
        },
        (LINEAR, *CONVOLUTIONS[:4]),
    ),
    "LOKR": Walk(
        {"r": 3, "alpha": 5},
        {
            "": {},
            "kernels apart": {"use_effective_conv2d": True},
            "patterns": {"rank_pattern": {"square": 2}, "alpha_pattern": {"wide": 3}},
            **products(r=(1, 20)),
            "both": {"decompose_both": True, "r": 1},
            "factor": {"decompose_factor": 4},
        },
        (LINEAR, *CONVOLUTIONS[:4]),
    ),
    "OFT": Walk(
        {"oft_block_size": 4},
        {
            "": {},
            **biased("oft"),
            "exact": {"use_cayley_neumann": False},
            "three terms": {"num_cayley_neumann_terms": 3},
            "constrained": {"coft": True, "eps": 0.3},
            "shared": {"block_share": True},
            "two blocks": {"r": 2, "oft_block_size": 0},
        },
        (LINEAR, "point", "embed"),
        {"conv2": {"blocks of 3": {"oft_block_size": 3}}, "grouped": {"": {}}},
        {"conv2": NO_CONVOLUTION, "grouped": NO_CONVOLUTION},
    ),
    "LN_TUNING": Walk({}, {"": {}}, (*(layer for layer in ALL if layer != "attention"),)),
    "TRAINABLE_TOKENS": Walk({"token_indices": [1, 3]}, {"": {}}, ("embed", "tall")),
}
NOT_INSTALLED = {"ADAMSS"}
"""It asks for scikit-learn; `tests/adapters/test_peft_variants.py` has a file as it writes it."""
Case = tuple[str, str, str, Fields]


def cases() -> Iterator[Case]:
    for kind, walk in KINDS.items():
        for layers in (*walk.layers, *(name for name in walk.only if name not in walk.layers)):
            shared = walk.options if layers in walk.layers else {}
            for option, fields in {**shared, **walk.only.get(layers, {})}.items():
                yield kind, layers, option, {**walk.fields, **fields}


CASES = list(cases())
