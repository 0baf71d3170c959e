# SPDX-License-Identifier: Apache-2.0
"""``surgery run``: from a graph and text to text, or from an encoder and text to scores."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from surgery.arguments import checked
from surgery.engine.inputs import StrPath, as_list, check_counts, local_path
from surgery.onnx.graph.contract import TEXT
from surgery.onnx.run.answering import answer, heard, open_pair
from surgery.onnx.run.chosen_adapters import ChosenAdapters, choose_adapters, own_tokenizer, slot_arrays
from surgery.onnx.run.encoder import adapter_labels, encode_groups, labels
from surgery.onnx.run.generate import generate
from surgery.onnx.run.images import look, read_images, reads_images
from surgery.onnx.run.inputs import Given, InputRow, given_inputs, input_rows, needs_text, said
from surgery.onnx.run.opening import GraphSession, open_graph
from surgery.onnx.run.prepare import chosen_past, sized_decoder
from surgery.onnx.run.result import RunResult, RunText
from surgery.onnx.run.sampling import Sampling
from surgery.onnx.run.streaming import Generation, Streaming, generate_groups
from surgery.onnx.run.task_scores import task_scores
from surgery.onnx.run.tokenizer import Tokenizer, open_tokenizer, stop_tokens
from surgery_formats.errors import FitError, UsageError

__all__ = ["RunResult", "run"]

_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")


@checked
def run(
    model: StrPath,
    inputs: Given | Sequence[Given] = (),
    *,
    chat: bool = False,
    system: str = "",
    stop: str | Sequence[str] = (),
    audio: StrPath | Sequence[StrPath] = (),
    images: StrPath | Sequence[StrPath] = (),
    start: Sequence[int] = (),
    device: str = "auto",
    max_new: int = 128,
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    adapters: StrPath | Sequence[StrPath] = (),
    prompt_adapter: StrPath | None = None,
    prompt: bool = True,
    weights: StrPath | None = None,
    threads: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> RunResult:
    """Run a graph on text.

    Args:
        model: The graph, or its folder.
        inputs: A text, a row of token ids, a conversation (a list of ``{"role": ..., "content": ...}``), or several of these
            and of pairs of texts (tuples of two). Of a graph that scores choices, all are those of one question.
        chat: Whether a text is what a user says, to be put into the model's chat template.
        system: What the template is told besides, in front; of conversations only those that have no such message.
        stop: Texts that end a row, and are cut off.
        audio: For a model of speech, instead of `inputs`: recordings of 16 kHz (.wav), or spectrograms (.npy).
        images: For a model of images, instead of `inputs`: ``pixel_values`` (.npy) as its image processor makes them, of one
            image or of several.
        start: For an encoder-decoder: the ids that its decoder begins with, instead of those of
            ``generation_config.json``: of another language, or task.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_new: Most new tokens for each.
        batch_size: Most texts, rows, recordings or images that run together; None for all.
        sampling: Greedy if None.
        adapters: ``.onnx_adapter`` files for the graph's slots; several add up. Or the name of an adapter
            inside the graph. Either may have a strength: ``NAME=0.5``. A classifier has the labels that the
            graph's contract names for the file.
        prompt_adapter: ``.onnx_adapter`` file of a soft prompt.
        prompt: Whether the graph's own soft prompt is used.
        weights: Folder of the weight files, where it is not the graph's own.
        threads: Of one operation on the cpu.
        on_text: Called with the input's number and new text as it comes.

    Raises:
        UsageError: an argument of a wrong type.
        InputError: something cannot be read.
        FitError: something does not fit the graph or this machine.
        ProofError: the weights are not those the graph was made for.
    """
    sounds: list[StrPath] = as_list(audio)
    recordings = [local_path(one, "audio") for one in sounds]
    seen: list[StrPath] = as_list(images)
    pictures = [local_path(one, "images") for one in seen]
    if sum(map(bool, (recordings, pictures, inputs))) > 1:
        raise FitError("text, sound or images at once", hint="one of them")
    batch = [] if recordings or pictures else given_inputs(inputs)
    words: list[str] = as_list(stop)
    check_counts(least=0, max_new=max_new)
    check_counts(threads=threads, batch_size=batch_size)
    if sampling is not None and not isinstance(sampling, Sampling):
        raise UsageError(f"sampling is a surgery.Sampling, not {type(sampling).__name__}")
    model = local_path(model, "model")
    began = time.perf_counter()
    opened = open_graph(model, device=device, weights=weights, threads=threads)
    load = time.perf_counter() - began
    contract = opened.contract
    _check_kind(opened, recordings, pictures, start, prompt_adapter)
    chosen = choose_adapters(as_list(adapters), opened)
    tokenizer, given = _rows(
        opened,
        own_tokenizer(chosen, opened),
        batch,
        needed=bool(words),
        begins=contract.prompt_kind != TEXT or not prompt or prompt_adapter is not None,  # else a text goes on
        chat=chat or bool(system),
        system=system,
    )
    inside = contract.virtual_tokens if contract.kind == "encoder" else 0
    blank = RunResult((), opened.memory.device, inside, load, 0.0, 0.0, 0, inputs=tuple(map(said, batch)))
    if contract.kind == "encoder":
        return _scores(opened, chosen, given, pictures, batch_size, tokenizer, blank)
    rows = [row.ids for row in given]
    writer = _AnswerWriter(
        opened, chosen, batch_size, max_new, sampling or Sampling(), Streaming(tokenizer, words, on_text)
    )
    if contract.encoder:
        return writer.answers(rows, recordings, start, blank)
    return writer.goes_on(rows, prompt_adapter, blank, own=prompt)


@dataclass(frozen=True, slots=True)
class _AnswerWriter:
    """Has a graph write new tokens, a few rows at a time.

    Attributes:
        opened: The graph.
        chosen: Adapters for its slots.
        batch_size: Most rows that run together; None for all.
        max_new: Most new tokens of a row.
        sampling: How tokens are drawn.
        streaming: Who is told of them.
    """

    opened: GraphSession
    chosen: ChosenAdapters
    batch_size: int | None
    max_new: int
    sampling: Sampling
    streaming: Streaming

    def goes_on(
        self, rows: list[list[int]], prompt_adapter: StrPath | None, blank: RunResult, *, own: bool
    ) -> RunResult:
        """What a decoder writes behind every row, and behind its `own` soft prompt or that of a file."""
        past = chosen_past(self.opened, prompt_adapter, own=own)
        slots = slot_arrays(self.chosen, self.opened)
        first, count = self.opened.contract.vocabulary_rows or (0, 0)
        ahead = list(range(first, first + count)) if own and prompt_adapter is None else []
        blank = replace(blank, virtual_tokens=len(ahead) + (past.tokens if past else 0))

        def going_on(group: slice) -> Generation:
            some = [ahead + row for row in rows[group]]
            decoder = sized_decoder(self.opened, len(some), max(map(len, some)) + self.max_new, slots, past)
            return partial(generate, decoder, some, max_new=self.max_new, sampling=self.sampling, stop=self._stop())

        return generate_groups(rows, self.batch_size or len(rows), going_on, self.streaming, blank)

    def answers(
        self, rows: list[list[int]], recordings: Sequence[Path], start: Sequence[int], blank: RunResult
    ) -> RunResult:
        """What an encoder-decoder writes of every row, or of recordings in their place."""
        began = time.perf_counter()
        pair = open_pair(self.opened, self.chosen)
        source = heard(pair, recordings) if recordings else rows
        blank = replace(blank, load_seconds=blank.load_seconds + time.perf_counter() - began)
        if recordings:
            rows, blank = [[]] * len(recordings), replace(blank, inputs=tuple(map(os.fspath, recordings)))

        def answering(group: slice) -> Generation:
            return partial(
                answer,
                pair,
                source[group],
                max_new=self.max_new,
                sampling=self.sampling,
                start=[int(token) for token in start],
                stop=self._stop(),
            )

        return generate_groups(rows, self.batch_size or len(rows), answering, self.streaming, blank)

    def _stop(self) -> frozenset[int]:
        return stop_tokens(self.opened.folder)


def _check_kind(
    opened: GraphSession,
    recordings: Sequence[Path],
    pictures: Sequence[Path],
    start: Sequence[int],
    prompt_adapter: StrPath | None,
) -> None:
    """Refuse what a graph of this kind does not take.

    Raises:
        FitError: it takes something else.
    """
    contract = opened.contract
    if (recordings or start) and not contract.encoder:
        raise FitError(
            f"`{'audio' if recordings else 'start'}=` is for encoder-decoders, which this is not", file=opened.path
        )
    if reads_images(opened) != bool(pictures):
        what = "`images=` is for encoders of images, which this is not" if pictures else "this graph reads images"
        raise FitError(what, file=opened.path, hint=None if pictures else "`images=` takes pixel_values (.npy)")
    if prompt_adapter is not None and (contract.kind == "encoder" or contract.encoder):
        kind = "this encoder" if contract.kind == "encoder" else "an encoder-decoder"
        raise FitError(f"{kind} takes no soft prompt", file=opened.path)


def _rows(
    opened: GraphSession, own: Path, batch: Sequence[Given], *, needed: bool, begins: bool, chat: bool, system: str
) -> tuple[Tokenizer | None, list[InputRow]]:
    """The tokenizer, if it is `needed` or here, and the rows of a batch; files that `own` lacks are those beside the graph.

    Raises:
        NotFoundError, MalformedError, FitError: see `open_tokenizer` and `input_rows`; a token id that the graph has not.
    """
    words = own if (own / "tokenizer.json").exists() else opened.folder
    template = own if any((own / name).exists() for name in _TEMPLATES) else opened.folder
    is_here = (words / "tokenizer.json").exists() and importlib.util.find_spec("tokenizers") is not None
    tokenizer = open_tokenizer(words) if needed or any(map(needs_text, batch)) or is_here else None
    given = input_rows(batch, tokenizer, template, begins=begins, chat=chat, system=system)
    _check_ids([row.ids for row in given], opened)
    return tokenizer, given


def _scores(
    opened: GraphSession,
    chosen: ChosenAdapters,
    given: Sequence[InputRow],
    pictures: Sequence[Path],
    batch_size: int | None,
    tokenizer: Tokenizer | None,
    blank: RunResult,
) -> RunResult:
    """What an encoder, or another graph that generates nothing, says of its inputs or `pictures`."""
    slots, classifier = slot_arrays(chosen, opened), adapter_labels(chosen.entries)
    if pictures:
        pixels, shown = read_images(opened, pictures)
        given, blank = [InputRow([], []) for _ in shown], replace(blank, inputs=shown)
        encode = partial(look, opened, pixels, slots, classifier.problem, batch_size or len(pixels))
    else:
        rows, kinds = [row.ids for row in given], [row.types for row in given]
        encode = partial(encode_groups, opened, rows, slots, classifier.problem, kinds, batch_size or len(rows))
    began = time.perf_counter()
    encoded = encode()
    seconds, names = time.perf_counter() - began, classifier.names or labels(opened)
    texts = tuple(
        RunText(tuple(row.ids), scores=task_scores(opened.contract.task, encoded, number, row, names, tokenizer))
        for number, row in enumerate(given)
    )
    return replace(blank, texts=texts, first_seconds=seconds, seconds=seconds, arrays={**encoded.arrays})


def _check_ids(rows: Sequence[Sequence[int]], opened: GraphSession) -> None:
    """Refuse token ids outside the embedding table.

    Ids beyond its end read foreign memory or fail without a message that names them; negative ids count from the end.
    """
    contract = opened.contract
    first, virtual = contract.vocabulary_rows or (contract.vocabulary, 0)
    limit = max(contract.vocabulary, first + virtual) or None  # of a foreign encoder nobody knows it
    for row in rows:
        if not row:
            raise FitError("a row without a token", hint="give at least one: most models have one for the beginning")
        if min(row) < 0 or (limit is not None and max(row) >= limit):
            size = f" that is not below {limit}, the size of the vocabulary" if limit is not None else " below 0"
            raise FitError(f"a token id{size}", file=Path(opened.path))
