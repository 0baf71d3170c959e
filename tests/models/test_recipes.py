# SPDX-License-Identifier: Apache-2.0
"""A recipe reads config.json as transformers does, of either era, and refuses what it does not know."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.errors import FitError
from surgery_formats.models.families.parameters import model_of, parameters
from surgery_formats.models.families.recipe import LanguageHead, Model
from surgery_formats.models.families.registry import families
from tests.oracles.recipes import CASES, DECODERS
from tests.support.exported_types import exported

KNOWN = sorted({name for family in families() if family.recipe for name in family.names})
HEAD = {"lm_head.weight", "embed_out.weight"}
BY_TYPE = ("gemma3", "olmo3")
"""Cases with rotary parameters for each type of layer, which transformers 4 spelt in other ways."""


def _config(name: str) -> dict[str, Any]:
    """config.json as save_pretrained writes it."""
    case = CASES[name]
    made = getattr(transformers, case.config)(**case.fields)
    made.architectures = [case.cls]
    return json.loads(made.to_json_string(use_diff=True))


def _tables(name: str, **changes: Any) -> Model:
    return model_of({**_config(name), **changes}, HEAD)


def test_every_recipe_is_compared_with_transformers() -> None:
    assert set(KNOWN) <= {row.type for row in exported() if row.cases}


@pytest.mark.parametrize(
    ("kind", "words"), [("glm4_moe", "not a multiple"), ("clip", "two towers"), ("siglip", "two towers")]
)
def test_what_the_defaults_of_transformers_make_no_one_model_of_is_refused(kind: str, words: str) -> None:
    with pytest.raises(FitError, match=words):
        model_of({"model_type": kind}, HEAD)


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind not in ("glm4_moe", "clip", "siglip")])
def test_missing_keys_have_the_defaults_of_transformers(kind: str) -> None:
    full = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    assert model_of({"model_type": kind}, HEAD) == model_of({**full, "architectures": None}, HEAD)


@pytest.mark.parametrize("name", [n for n in DECODERS if "rope_parameters" in _config(n) and not n.startswith(BY_TYPE)])
def test_rotary_parameters_of_both_versions_give_the_same_recipe(name: str) -> None:
    config = _config(name)
    new = model_of(config, HEAD)
    rope = dict(config.pop("rope_parameters"))
    neox = name.startswith("gpt_neox")
    config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if (fraction := rope.pop("partial_rotary_factor", None)) is not None:
        config["rotary_pct" if neox else "partial_rotary_factor"] = fraction
    kind = rope.pop("rope_type")
    original = rope.pop("original_max_position_embeddings", None)
    if original is not None:
        config["original_max_position_embeddings" if name.startswith("phi3") else "_"] = original
        rope |= {} if name.startswith("phi3") else {"original_max_position_embeddings": original}
    for word in ("type", "rope_type"):
        old = {**config, "rope_scaling": None if kind == "default" else {word: kind, **rope}}
        assert model_of(old, HEAD) == new


def test_gemma_3_configurations_of_transformers_4_are_read() -> None:
    config = _config("gemma3_scaled")
    new = model_of(config, HEAD)
    del config["rope_parameters"]
    old = config | {
        "rope_theta": 3000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    assert model_of(old, HEAD) == new
    ropes = [layer.attention.rope for layer in new.layers]
    assert [rope and rope.parameters["rope_type"] for rope in ropes] == ["linear", "default", "linear"]


def test_su_in_the_first_phi_3_means_longrope() -> None:
    config = _config("phi3_longrope_long")
    scaling = {"type": "su", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.5, 2.0, 3.0, 4.0]}
    del config["rope_parameters"]
    rope = model_of({**config, "rope_theta": 10000.0, "rope_scaling": scaling}, HEAD).layers[0].attention.rope
    assert rope == _tables("phi3_longrope_long").layers[0].attention.rope


def test_the_head_is_tied_by_config_by_family_and_by_absence() -> None:
    def weight(config: dict[str, Any], names: set[str]) -> str:
        head = model_of(config, names).head
        assert isinstance(head, LanguageHead)
        return head.projection.weight

    llama = {"model_type": "llama"}
    assert weight(llama, HEAD) == "lm_head.weight"
    assert weight(llama, set()) == "model.embed_tokens.weight"
    assert weight({**llama, "tie_word_embeddings": False}, set()) == "lm_head.weight"
    assert weight({"model_type": "gpt2"}, set()) == "transformer.wte.weight"
    tied = model_of({**llama, "tie_word_embeddings": True}, HEAD)
    assert list(tied.unused) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("kind", "keys", "divisor"),
    [
        ("t5", {"tie_word_embeddings": False}, 1),  # as transformers 4 saves T5 1.1
        ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1),  # as transformers 5 saves it
        ("mt5", {"tie_word_embeddings": True}, 1),
        ("umt5", {"tie_word_embeddings": False}, 1),  # transformers 5 scales it all the same
        ("umt5", {"tie_word_embeddings": True}, 8),
    ],
)
def test_a_stored_head_of_t5_is_used_whoever_saved_it(kind: str, keys: dict[str, bool], divisor: float) -> None:
    name = {"t5": "t5_flan"}.get(kind, kind)
    config = {key: value for key, value in _config(name).items() if key != "scale_decoder_outputs"}
    head = model_of({**config, "d_model": 64, **keys}, {"shared.weight", "lm_head.weight"}).head
    assert isinstance(head, LanguageHead)
    assert head.projection.weight == "lm_head.weight"
    assert head.divisor == divisor


def test_runs_of_layer_kinds_are_spelt_out() -> None:
    config = {"model_type": "gpt_neo", "num_layers": 5, "num_heads": 4, "hidden_size": 32}
    runs = [[["global", "local"], 2], [["local"], 1]]
    layers = model_of({**config, "attention_types": runs}, HEAD).layers
    assert [layer.attention.window for layer in layers] == [None, 256, None, 256, 256]
    for wrong in ([["global"]], [[["global"], 4]], [[["other"], 5]], "global"):
        with pytest.raises(FitError, match="attention_types"):
            model_of({**config, "attention_types": wrong}, HEAD)


def test_files_of_bare_models_and_of_tensorflow_keep_their_names() -> None:
    gpt2 = parameters(model_of({"model_type": "gpt2"}, {"wte.weight"}))
    assert "h.0.attn.c_attn.weight" in gpt2
    names = {"embeddings.word_embeddings.weight", "embeddings.LayerNorm.gamma", "pooler.dense.weight"}
    bert = parameters(model_of({"model_type": "bert", "architectures": ["BertModel"]}, names))
    assert {"embeddings.LayerNorm.beta", "pooler.dense.bias", "encoder.layer.0.output.LayerNorm.weight"} <= set(bert)


PUBLISHED: dict[str, dict[str, Any]] = {
    "starcoder2": {"layer_norm_epsilon": 1e-05, "scale_attn_weights": True, "attention_softmax_in_fp32": True},
    "lfm2": {
        "block_norm_eps": 1e-05,
        "block_mlp_init_scale": 1.0,
        "block_use_swiglu": True,
        "conv_dim": 32,
        "theta": 1e6,
    },
    "apertus": {"qk_norm": True, "post_norm": False, "mlp_bias": False, "hidden_dropout": 0.0},
    "hunyuan": {"attention_head_dim": 16, "use_cla": False, "cla_share_factor": 2, "use_rotary_pos_emb": True},
    "bloom": {
        "offset_alibi": 100,
        "skip_bias_add": True,
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": True,
    },
    "gptj": {"rotary": True, "scale_attn_weights": True, "summary_first_dropout": 0.1, "gradient_checkpointing": False},
    "gpt_bigcode": {"pre_allocate_kv_cache": False, "inference_runner": 0, "pad_key_length": True},
    "cohere2": {
        "layer_switch": 4,
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_parallel_block": True,
    },
    "mpt": {"init_config": {"name": "kaiming_normal_"}, "learned_pos_emb": True, "verbose": 0, "emb_pdrop": 0},
    "falcon_7b": {"apply_residual_connection_post_layernorm": False, "ff_factor": 4},
}
"""Keys that published files have beside those of transformers' own configurations, and that change nothing."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_files_that_change_nothing_are_read(name: str) -> None:
    assert _tables(name, **PUBLISHED[name]) == _tables(name)


SWITCHES = [
    ("gemma", "use_bidirectional_attention", True),
    ("gpt2", "add_cross_attention", True),
    ("bert_sequence", "is_decoder", True),
    ("bert_sequence", "position_embedding_type", "relative_key"),
    ("llama", "is_causal", False),
    ("olmo2", "clip_qkv", 8.0),
    ("falcon_7b", "apply_residual_connection_post_layernorm", True),
    ("falcon_7b", "num_ln_in_parallel_attn", 2),
    ("falcon_40b", "parallel_attn", False),
    ("bloom", "apply_residual_connection_post_layernorm", True),
    ("mpt", "attn_config", {"alibi_bias_max": 4}),
    ("mpt", "attn_config", {"attn_type": "multiquery_attention"}),
    ("mpt", "attn_config", {"rope": True}),
    ("mpt", "expansion_ratio", 2),
    ("mpt", "logit_scale", 0.5),
    ("gptj", "scale_attn_weights", False),
    ("cohere2", "use_qk_norm", True),
    ("apertus", "hidden_act", "relu2"),
    ("hunyuan", "use_qk_norm", False),
    ("cwm", "mlp_bias", True),
    ("lfm2", "conv_bias", True),
    ("lfm2", "tie_embedding", False),
    ("llava", "architectures", ["LlavaForSequenceClassification"]),
    ("llava", "text_config", {"model_type": "mamba"}),
    ("gemma3", "attn_logit_softcapping", 50.0),
    ("mistral", "layer_types", ["full_attention"] * 3),
    ("qwen2", "layer_types", ["chunked_attention"] * 3),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "some_new_logit_softcapping", 30.0),
    ("llama", "use_qk_norm", True),
    ("llama", "num_experts", 8),
    ("gpt_neox", "rope_theta", 5.0),
    ("modernbert_mean", "classifier_pooling", "max"),
    ("modernbert_mean", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("deberta_v2_sequence", "pos_att_type", "c2p|p2p"),
    ("deberta_v2_sequence", "norm_rel_ebd", "rms_norm"),
    ("deberta_v2_sequence", "conv_kernel_size", 4),
    ("deberta_v2_sequence", "attention_head_size", 16),
    ("deberta_v2_sequence", "position_buckets", 3),
    ("deberta_sequence", "talking_head", True),
    ("mpnet_sequence", "relative_attention_num_buckets", 16),
    ("eurobert_late", "classifier_pooling", "cls"),
]


@pytest.mark.parametrize(("name", "key", "value"), SWITCHES, ids=[f"{n}-{k}-{v}" for n, k, v in SWITCHES])
def test_an_unsupported_setting_is_refused_by_name(name: str, key: str, value: Any) -> None:
    with pytest.raises(FitError, match="|".join((key, *value)) if isinstance(value, dict) else key):
        _tables(name, **{key: value})


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("llama", "num_attention_heads", 0, "whole number"),
        ("llama", "num_attention_heads", True, "whole number"),
        ("llama", "num_attention_heads", "4", "whole number"),
        ("llama", "num_key_value_heads", 3, "multiple"),
        ("llama", "num_hidden_layers", 1 << 30, "whole number"),
        ("bert_sequence", "num_attention_heads", 5, "multiple"),
        ("llama", "hidden_act", "mish", "mish"),
        ("llama", "rms_norm_eps", "1e-5", "number"),
        ("llama", "rms_norm_eps", 0, "above 0"),
        ("llama", "attention_bias", 1, "true or false"),
        ("llama", "rope_parameters", {"rope_type": "mrope"}, "mrope"),
        ("llama", "rope_parameters", {"rope_type": "linear"}, "factor"),
        ("llama", "rope_parameters", {"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ("llama", "rope_parameters", {"full_attention": {"rope_type": "default"}}, "layer type|full_attention"),
        ("llama", "rope_parameters", [1], "object"),
        ("phi3_longrope_long", "rope_parameters", {"rope_type": "longrope", "short_factor": [1.0]}, "short_factor"),
        ("gemma3", "rope_parameters", {"rope_type": "default"}, "layer type"),
        ("llama", "architectures", ["LlamaForMultipleChoice"], "LlamaForMultipleChoice"),
        ("bert_sequence", "architectures", ["BertForNextSentencePrediction"], "BertForNextSentencePrediction"),
        ("roberta_sequence", "max_position_embeddings", 2, "position"),
        ("smollm3", "no_rope_layers", [1, 2, 1], "no_rope_layers"),
        ("t5_encoder", "relative_attention_num_buckets", 6, "relative_attention_num_buckets"),
        ("t5_encoder", "relative_attention_max_distance", 4, "relative_attention_num_buckets"),
        ("t5_encoder", "feed_forward_proj", "gated-quick", "feed_forward_proj"),
        ("bart", "decoder_attention_heads", 5, "decoder_attention_heads"),
        ("whisper", "num_mel_bins", 0, "whole number"),
        ("t5", "architectures", ["T5ForTokenClassification"], "TokenClassification"),
        ("t5", "num_decoder_layers", 1 << 30, "whole number"),
        ("llama", "model_type", "mamba", "mamba"),
        ("gptj", "rotary_dim", 6.0, "whole number"),
        ("gptj", "rotary_dim", 10, "even"),
        ("gpt_neo", "attention_layers", ["local", "global", "strided"], "strided"),
        ("exaone4_global", "sliding_window", 0, "whole number"),
        ("falcon_40b", "num_kv_heads", 3, "multiple"),
        ("hunyuan", "rope_parameters", {"rope_type": "dynamic", "alpha": "2"}, "alpha"),
        ("bloom", "n_head", 1 << 24, "whole number"),
        ("mixtral", "num_local_experts", 1 << 24, "whole number"),
        ("deepseek_v3", "n_routed_experts", 1 << 24, "whole number"),
        ("deepseek_v3", "num_nextn_predict_layers", 1 << 24, "whole number"),
        ("ministral3", "rope_parameters", {"rope_type": "yarn"}, "original_max_position_embeddings"),
        (
            "ministral3",
            "rope_parameters",
            {"rope_type": "yarn", "original_max_position_embeddings": 8},
            "llama_4_scaling",
        ),
        ("olmo3", "rope_parameters", {"rope_type": "default"}, "layer type"),
        ("llama", "model_type", ["llama"], "no recipe"),
    ],
)
def test_invalid_configurations_are_refused(name: str, key: str, value: Any, words: str) -> None:
    with pytest.raises(FitError, match=words):
        _tables(name, **{key: value})


def test_an_alpha_without_values_to_rotate_is_refused() -> None:
    with pytest.raises(FitError, match="alpha needs more than 2 values per head"):
        _tables("hunyuan", head_dim=2, attention_head_dim=2, rope_parameters={"rope_type": "dynamic", "alpha": 5.0})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CASES)), value=_JSON)
def test_malformed_config_values_raise_fit_error_or_give_shapes(data: st.DataObject, name: str, value: Any) -> None:
    config = _config(name)
    key = data.draw(st.sampled_from(sorted(config)))
    with contextlib.suppress(FitError):
        shapes = parameters(model_of({**config, key: value}, HEAD))
        assert all(size > 0 for shape in shapes.values() for size in shape[1:])
        assert all(not shape or shape[0] > 0 or shape[0] == -1 for shape in shapes.values())


def test_recipes_of_the_examples_use_every_tensor() -> None:
    from surgery_formats.models.checkpoint import open_checkpoint

    component = open_checkpoint(Path("examples/base")).main
    assert set(parameters(model_of(component.config, component.tensors))) == set(component.tensors)


NOMIC_OF_THE_AUTHORS = {
    "model_type": "nomic_bert",
    "architectures": ["NomicBertModel"],
    "n_embd": 768,
    "n_inner": 3072,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 8192,
    "vocab_size": 30528,
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-12,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "causal": False,
    "qkv_proj_bias": False,
    "type_vocab_size": 2,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "use_flash_attn": True,
    "fused_bias_fc": True,
    "max_trained_positions": 2048,
}


def test_nomics_own_configuration_gives_the_recipe_of_transformers() -> None:
    ours = transformers.NomicBertConfig(max_position_embeddings=8192, architectures=["NomicBertModel"])
    own = model_of(NOMIC_OF_THE_AUTHORS, ())
    assert own == model_of(json.loads(ours.to_json_string(use_diff=False)), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_scaling_factor", 2),
        ("rotary_emb_fraction", None),
        ("rotary_emb_fraction", 0.5),
        ("rotary_emb_interleaved", True),
        ("activation_function", "gelu"),
        ("prenorm", True),
        ("num_experts", 8),
        ("moe_every_n_layers", 2),
    ],
)
def test_what_nomics_other_models_compute_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FitError, match=key):
        model_of({**NOMIC_OF_THE_AUTHORS, key: value}, ())


def test_modernbert_configurations_of_transformers_4_are_read() -> None:
    config = _config("modernbert_mean")
    new = model_of(config, ())
    del config["rope_parameters"], config["layer_types"]
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    assert model_of({**config, **old, "position_embedding_type": "absolute", "rope_scaling": None}, ()) == new
    one = model_of({**config, **old, "local_rope_theta": None}, ())
    assert [layer.attention.rope.parameters["rope_theta"] for layer in one.layers] == [160000.0] * 3  # type: ignore[union-attr]
    assert [layer.attention.window for layer in one.layers] == [None, 3, 3]
