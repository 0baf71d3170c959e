# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens as rows of the vocabulary, with the tokenizer and the configuration that make every server read them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery.engine.card import CARD, model_name, name_of
from surgery.engine.execute import Run, execute
from surgery.engine.ledger import Ledger
from surgery.engine.plan import Plan, SideFile
from surgery.engine.rebuild.rebuild_plan import plan_rebuilt
from surgery.engine.rebuild.rebuilt_card import rebuilt_card
from surgery.prompts.bake_result import BakeResult
from surgery.prompts.token_files import TokenFiles, first_id, token_files
from surgery.prompts.vocabulary import Vocabulary, recipe_of, vocabulary_of
from surgery.reports.markdown import markdown_rows
from surgery_formats.arrays import all_finite, cast
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.rebuilt.rebuilt import one_network, rebuilt_of
from surgery_formats.models.rebuilt.virtual_rows import with_virtual_rows
from surgery_formats.storage.base import read_rows
from surgery_formats.tensors.tensor import as_bytes

__all__ = ["TokenPlan", "plan_tokens", "write_tokens"]

_LOADING = 'model = AutoModelForCausalLM.from_pretrained("{0}")\ntokenizer = AutoTokenizer.from_pretrained("{0}")'
_GEMMA = "gemma"


@dataclass(frozen=True)
class TokenPlan:
    """A model whose vocabulary has virtual tokens, before it is written.

    Attributes:
        adapter: That has them.
        base: The model.
        plan: Of its files.
        rows: What the embedding has from `first` on, as it is read.
        first: Id of the first.
        embedding: Name of the token embedding.
        result: What will be reported.
    """

    adapter: Adapter
    base: Checkpoint
    plan: Plan
    rows: np.ndarray
    first: int
    embedding: str
    result: BakeResult


def plan_tokens(adapter: Adapter, prompt: SoftPrompt, base: Checkpoint, name: str, *, keep_tie: bool) -> TokenPlan:
    """Plan the model of `base` with the tokens of `prompt`, called ``<name_0>`` ...

    Raises:
        FitError: keys and values; another base; weights trained beside the tokens; a model whose rows are codes.
    """
    component = one_network(base)
    _check(adapter, prompt)
    model = recipe_of(component)
    if model is not None and model.kind != "decoder":
        raise FitError("tokens are baked for decoders, which read them before a text", file=base.path)
    vocabulary = vocabulary_of(component, prompt)
    wanted = cast(prompt.embeddings(), DType.F32)
    rows = cast(np.asarray(wanted, np.float64) / vocabulary.scale, vocabulary.storage.dtype)
    if not all_finite(rows):
        raise FitError(f"a value too large for {vocabulary.storage.dtype.label}", file=prompt.table.path)
    side_files = dict(base.side_files)
    given = first_id(side_files)
    first = min(given, vocabulary.size) if given is not None else vocabulary.size
    if given is not None and given > vocabulary.size:
        raise FitError(
            f"the tokenizer has {given} tokens, the model {vocabulary.size} rows: the next token would have none",
            file=base.path,
        )
    rebuilt = with_virtual_rows(rebuilt_of(base), bytes(as_bytes(rows)), len(rows), first, keep_tie=keep_tie)
    files = token_files(side_files, component.config, len(rows), first, name)
    rebuilt = replace(rebuilt, side_files={**rebuilt.side_files, **files.files})
    plan = plan_rebuilt(rebuilt)
    new = [SideFile(file, data=data) for file, data in files.files.items() if file not in side_files]
    facts = {**plan.facts, "prompt": fingerprint_of_rows(rows), "name": name}
    digest = hashlib.sha256(f"{plan.id} {facts['prompt']} {name} {keep_tie}".encode()).hexdigest()
    roots = (*plan.roots, adapter.path)
    plan = replace(plan, verb="prompt bake", id=digest, side_files=(*plan.side_files, *new), facts=facts, roots=roots)
    result = BakeResult(
        None,
        "tokens",
        adapter.path,
        base.path,
        prompt.kind,
        len(rows),
        tuple(range(first, first + len(rows))),
        files.text if given is not None else "",
        _head(component, keep_tie=keep_tie),
        _rounding(wanted, rows, vocabulary),
        _told(files, given),
        warnings=(*plan.warnings, *_warnings(component, vocabulary, files, given, first, keep_tie=keep_tie)),
    )
    return TokenPlan(adapter, base, plan, rows, first, component.embedding, result)


def write_tokens(planned: TokenPlan, output: Path, run: Run) -> BakeResult:
    """Write the model, and read the rows back.

    Raises:
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """

    def last(staged: OutputFolder) -> None:
        written = open_checkpoint(staged.staged).main
        storage = written.parameters[planned.embedding].storage
        found = read_rows(storage, planned.first, planned.first + len(planned.rows))
        if bytes(as_bytes(found)) != bytes(as_bytes(planned.rows)):
            raise ProofError("its rows are not those of the prompt", file=output, tensor=planned.embedding)

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        adapter, base = planned.adapter, planned.base
        text = rebuilt_card(
            base,
            f"{model_name(base)} with {name_of(adapter.path)} in its vocabulary",
            ledger,
            markdown_rows(planned.result.figures()),
            adapters=[(adapter, 1.0)],
            relation="merge",
            tags=("merge",),
            warnings=planned.result.warnings,
        )
        return {CARD: text}

    execute(planned.plan, output, run, finish, last=last)
    return replace(planned.result, output=output, loading=_LOADING.format(output))


def fingerprint_of_rows(rows: np.ndarray) -> str:
    """A digest of the numbers of a prompt as they are stored."""
    return hashlib.sha256(as_bytes(rows)).hexdigest()


def _check(adapter: Adapter, prompt: SoftPrompt) -> None:
    if prompt.submodules > 1:
        raise FitError("the soft prompt is for an encoder and its decoder", file=adapter.path)
    if prompt.prefix is not None:
        raise FitError(
            f"{prompt.kind} holds keys and values of every layer, which no token of a vocabulary has",
            file=adapter.path,
            hint='bake it as keys and values: `form="kv"`',
        )
    if adapter.updates and adapter.prompt is not None:
        raise FitError(
            f"it also changes {len(adapter.updates)} weights of the model, which tokens cannot hold",
            file=adapter.path,
            hint="a head that was trained beside the tokens stays with PEFT",
        )


def _head(component: Component, *, keep_tie: bool) -> str:
    if not component.head:
        return ""
    if component.tied and keep_tie:
        return "tied: its rows are the virtual tokens'; only generation_config.json keeps them from being said"
    parted = "parted from the embedding; " if component.tied else ""
    return (
        f"{parted}its rows are the mean of all others: never the greatest logit, at most one in the vocabulary's size"
    )


def _rounding(wanted: np.ndarray, rows: np.ndarray, vocabulary: Vocabulary) -> float:
    """Greatest error of a value as the model reads it, by the greatest value."""
    scale = float(np.abs(wanted).max()) or 1.0
    read = cast(rows, DType.F32).astype(np.float64) * vocabulary.scale
    return float(np.abs(read - wanted).max()) / scale


def _told(files: TokenFiles, given: int | None) -> dict[str, str]:
    told = {"generation_config.json": "suppress_tokens has them: transformers never chooses one"}
    if given is not None:
        told["tokenizer.json"] = "has them as words, and puts them before every text"
        if files.template:
            told["chat template"] = "begins with them"
    return told


def _warnings(
    component: Component, vocabulary: Vocabulary, files: TokenFiles, given: int | None, first: int, *, keep_tie: bool
) -> list[str]:
    found = []
    if given is None:
        found.append(f"there is no tokenizer.json: put the ids from {first} on before every text yourself")
    if not vocabulary.told:
        found.append("whether this model scales its embeddings is not known; it is taken not to")
    family = str(component.config.get("model_type", ""))
    if component.tied and component.head and not keep_tie and family.startswith(_GEMMA):
        found.append("vLLM and llama.cpp know Gemma with a tied head alone: for these keep it tied")
    if given is not None and not files.template:
        found.append("there is no chat template: a conversation gets them only if its text is encoded as a start")
    return found
