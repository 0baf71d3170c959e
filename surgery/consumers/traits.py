# SPDX-License-Identifier: Apache-2.0
"""What parts of adapters are, as far as programs tell them apart. Every consumer has a rule for each of these."""

from __future__ import annotations

from typing import Literal

__all__ = ["Trait"]

Trait = Literal[
    "LoRA",
    "LoRA of an embedding",
    "LoRA of the head",
    "LoRA of a convolution",
    "LoRA of one expert",
    "LoRA of stacked experts",
    "LoRA of a turned weight",
    "LoRA taken for experts",
    "LoRA on a changed base",
    "DoRA",
    "other kind",
    "bias of a LoRA",
    "trained bias",
    "saved norm",
    "saved head",
    "saved module",
    "saved vocabulary",
    "added rows",
    "carried weight",
    "token rows",
    "virtual tokens",
    "pattern of targets",
    "no targets",
    "beyond the targets",
    "unusable targets",
    "missing fields",
    "bias setting",
    "promised modules",
    "null patterns",
    "block-diagonal factors",
    "bare names",
    "wrapped names",
    "doubled prefix",
    "names of an adapter",
    "targeted parameters",
    "added tokens",
    "pickled weights",
    "other weight files",
]
"""
``LoRA of a turned weight``
    Of a layer that the base stores as ``(in, out)``: GPT-2's ``Conv1D``.
``LoRA taken for experts``
    Of a dense layer or of shared experts, under a name that PEFT has for experts of older releases in this model type.
``LoRA on a changed base``
    PiSSA, OLoRA and others as they were trained: beside a part of the base that was taken away.
``other kind``
    An update that the file holds in another form than LoRA.
``bias of a LoRA``
    ``lora_bias``.
``trained bias``
    ``bias="all"`` or ``"lora_only"``.
``saved norm``, ``saved head``, ``saved module``, ``saved vocabulary``
    Modules trained in full; a head is one that the base lacks or that classifies, a vocabulary is the embedding or the
    head of the language model, with the base's rows.
``added rows``
    A vocabulary with more rows than the base's.
``carried weight``
    The base's own values, which PEFT stores beside a LoRA of the vocabulary.
``token rows``
    ``trainable_token_indices``.
``pattern of targets``
    ``target_modules`` is one regular expression.
``no targets``
    ``target_modules`` is null, or is not there.
``beyond the targets``
    A module with factors that the configuration does not choose: by its targets, its layers, or what it excludes.
``unusable targets``
    ``target_modules``, or a field that limits it, is of a type that PEFT cannot use, or excludes another; or together they
    choose no module of the model.
``missing fields``
    ``r`` or ``lora_alpha`` is null, or is not there.
``bias setting``
    ``bias`` is not ``none``, or ``lora_bias`` is set, whether biases are stored or not.
``promised modules``
    ``modules_to_save`` or ``trainable_token_indices`` names what the file lacks.
``null patterns``
    ``rank_pattern`` or ``alpha_pattern`` is null.
``block-diagonal factors``
    ``use_bdlora``.
``bare names``
    Tensors are called ``model.layers...``, without ``base_model.model.`` before it.
``wrapped names``
    Tensors have segments of programs that wrapped the model in training: ``_orig_mod``, ``module``.
``doubled prefix``
    Tensors are called ``base_model.model.base_model.model...``: an adapter was wrapped once more before it was saved.
``names of an adapter``
    Tensors are called ``lora_A.default.weight``, as in memory.
``targeted parameters``
    ``target_parameters`` is set.
``added tokens``
    ``added_tokens.json`` has tokens beyond the base's vocabulary.
``other weight files``
    Weights in several files, or in one of another name than programs look for.
"""
