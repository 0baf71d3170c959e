# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask of the inputs and outputs of graphs, checked against the model and its adapters."""

from __future__ import annotations

from dataclasses import replace

from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.pairs import check_pair
from surgery.onnx.export.sentence import sentence_file
from surgery.onnx.graph.build import GraphSet
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Experts
from surgery_formats.text import show

__all__ = [
    "check_fused",
    "with_embeddings",
    "with_experts",
    "with_logits",
    "with_positions",
    "with_required",
    "with_sentence",
]


def with_required(assembly: Assembly, required: bool, packed: bool) -> Assembly:
    """The same with slots that have no default, or are packed, if that is asked for.

    Raises:
        FitError: there are none, or adapters replace parameters, whose values every caller would have to pass.
    """
    if not required and not packed:
        return assembly
    if not assembly.slots:
        what = "require" if required else "pack"
        raise FitError(f"no adapter is swapped, so there are no slots to {what}", hint="`swap=` names one")
    if required and (named := next((one for one in assembly.slots if one.replaced), None)):
        raise FitError(
            "it replaces parameters, whose inputs have the base's values as default",
            file=named.adapter.path,
            hint="without `required=`, or merge it",
        )
    return replace(assembly, options=replace(assembly.options, required=required, packed=packed))


def with_experts(assembly: Assembly, asked: str, *, older: bool) -> Assembly:
    """The same with a layer's experts in one operator or each by itself.

    Args:
        assembly: What the graphs are made of.
        asked: ``auto``, ``fused`` or ``apart``.
        older: Whether the graph is for runtimes without such an operator, or with one that is slow.

    Raises:
        FitError: one operator is asked for, and the target or the model has no use for it.
    """
    target = assembly.options.target
    if asked == "fused":
        mixed = any(isinstance(layer.mlp, Experts) for layer in assembly.model.layers)
        if target.experts == "apart" or not mixed or older:
            what = (
                "the model has no experts" if not mixed else f"the target {target.name} has no operator for all experts"
            )
            what = "older runtimes have no operator for all experts" if older and mixed else what
            raise FitError(f"{what} that is known to be right", hint='`experts="auto"`')
        return replace(assembly, options=replace(assembly.options, target=replace(target, experts="fused")))
    if asked == "apart" or older:
        return replace(assembly, options=replace(assembly.options, target=replace(target, experts="apart")))
    return assembly


def check_fused(draft: GraphSet, asked: str) -> None:
    """Refuse graphs of which no layer has its experts in one operator, where that is asked for.

    Raises:
        FitError: there is none.
    """
    nodes = (node.op_type for graph in draft.graphs.values() for node in graph.unpacked().graph.node)
    if asked == "fused" and not {"MoE", "QMoE"} & set(nodes):
        raise FitError(
            "no layer has experts that one operator computes exactly: their router, activation, slots or codes are others",
            hint='`experts="auto"`',
        )


def with_logits(assembly: Assembly, asked: str) -> Assembly:
    """The same with a choice of positions whose logits are computed, if that is asked for, or the default of the target.

    Raises:
        FitError: no such choice, or a model that does not generate.
    """
    if asked not in ("auto", "all", "input"):
        raise FitError(f"logits is '{show(asked, 40)}'", hint="auto, all or input")
    if asked == "input" and not assembly.model.generates:
        raise FitError("only a model that generates has logits of the next token to choose from")
    # the decoder of an encoder-decoder begins with one token or a few
    worth = assembly.options.target.name != "cuda" and assembly.model.encoder is None
    keep = asked == "input" or (asked == "auto" and worth)
    return replace(assembly, options=replace(assembly.options, keep_logits=keep))


def with_positions(assembly: Assembly, asked: bool) -> Assembly:
    """The same with positions as an input, if that is asked for.

    Raises:
        FitError: an encoder; a soft prompt, whose tokens clients do not count.
    """
    check_pair(assembly.model, positions=asked)
    if asked and (not assembly.model.generates or assembly.prompts):
        what = "with a soft prompt, its positions" if assembly.prompts else "without a cache, its positions"
        raise FitError(f"{what} are counted by the graph", hint="without `position_ids=`")
    return replace(assembly, options=replace(assembly.options, position_ids=asked))


def with_embeddings(assembly: Assembly, asked: bool, layout: str) -> Assembly:
    """The same with embeddings as input instead of token ids, if that is asked for.

    Raises:
        FitError: a model that does not generate, or in which more than an embedding tells an image from a text; a soft prompt;
            a layout in which nobody looks for the graph that makes embeddings.
    """
    if not asked:
        return assembly
    model = assembly.model
    if not model.generates or model.encoder is not None:
        raise FitError("only decoders that generate take embeddings", hint="without `inputs_embeds=`")
    if model.only_text:
        raise FitError(
            f"embeddings of images would be read as a text's: {model.only_text}", hint="without `inputs_embeds=`"
        )
    if assembly.prompts:
        raise FitError("a soft prompt stands before tokens, not before embeddings", hint="without `inputs_embeds=`")
    if layout != "plain":
        raise FitError(f"the layout {layout} has no place for the graph of embeddings", hint='`layout="plain"`')
    return replace(assembly, options=replace(assembly.options, inputs_embeds=True))


def with_sentence(assembly: Assembly) -> Assembly:
    """The same with the modules of sentence-transformers that lie beside the model.

    Raises:
        InputError: they cannot be read.
        FitError: a module that is not known, or one soft prompt in front.
    """
    sentence = sentence_file(assembly.component.folder, assembly.model.hidden)
    options = replace(assembly.options, overrides={**assembly.options.overrides, **sentence.overrides})
    return replace(assembly, model=sentence.on(assembly.model), options=options, sentence=sentence)
