# SPDX-License-Identifier: Apache-2.0
"""``surgery run``: from a graph and text to text, or from an encoder and text to scores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from surgery.arguments import checked
from surgery.engine.inputs import StrPath, as_list, check_counts, local_path
from surgery.onnx.graph.adapter_names import check_adapter_file
from surgery.onnx.graph.contract import TEXT
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.onnx.run.adapters import Past, prompt_past
from surgery.onnx.run.answering import answer, heard, open_pair
from surgery.onnx.run.chosen_adapters import choose_adapters, own_tokenizer, slot_arrays
from surgery.onnx.run.decoder import Decoder, default_past, make_decoder
from surgery.onnx.run.encoder import adapter_labels, encode_groups, labels
from surgery.onnx.run.generate import Continuation, generate
from surgery.onnx.run.images import look, read_images, reads_images
from surgery.onnx.run.inputs import Given, InputRow, given_inputs, input_rows, needs_text, said
from surgery.onnx.run.opening import GraphSession, open_graph
from surgery.onnx.run.sampling import Sampling
from surgery.onnx.run.stop_words import CutText
from surgery.onnx.run.task_scores import task_scores
from surgery.onnx.run.tokenizer import TextStream, Tokenizer, open_tokenizer, stop_tokens
from surgery.reports.result import summarised
from surgery.reports.sections import Note, Verbatim
from surgery.reports.summary import Summary
from surgery.reports.to_json import plain
from surgery_formats.errors import FitError, UsageError
from surgery_formats.text import show

__all__ = ["RunResult", "RunText", "prepare_decoder", "run"]

Generation = Callable[..., tuple[Continuation, ...]]
"""A generation that is prepared; it takes `on_token`."""

_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
_BEST = 3  # labels of an encoder that are shown


@dataclass(frozen=True)
class RunText:
    """The output for one input.

    Attributes:
        prompt: Ids that went in, virtual ones not among them.
        tokens: New ids.
        text: Of the new ids; None without a tokenizer.
        reason: Why it ended: ``stop``, ``length`` or ``full``; empty for an encoder.
        scores: Of an encoder that classifies: label to probability (of a regression: value), of the text or of each
            token.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    text: str | None = None
    reason: str = ""
    scores: tuple[dict[str, float], ...] = ()


@summarised
@dataclass(frozen=True)
class RunResult:
    """All that came out.

    Attributes:
        texts: One per input.
        device: It ran on.
        virtual_tokens: Of the soft prompt in use.
        load_seconds: Until the session stood.
        first_seconds: Prefill and first token.
        seconds: Of the whole generation.
        new_tokens: Of all rows.
        arrays: Raw outputs of an encoder, by name.
        inputs: As they were given.
    """

    texts: tuple[RunText, ...]
    device: str
    virtual_tokens: int
    load_seconds: float
    first_seconds: float
    seconds: float
    new_tokens: int
    arrays: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str | tuple[int, ...], ...] = ()

    warnings: ClassVar[tuple[str, ...]] = ()  # a text that reached the longest sequence has the reason full
    nbytes: ClassVar[int] = 0  # not counted for this verb

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        record: dict[str, Any] = plain(replace(self, arrays={}))
        del record["inputs"]
        return record | {"arrays": {name: list(array.shape) for name, array in self.arrays.items()}}

    def summary(self, *, verbose: bool = False) -> Summary:
        """The text or the scores of every input, then device and times.

        With `verbose` also the input and output tokens of each.
        """
        lines = [line for number, text in enumerate(self.texts) for line in self._lines(number, text)]
        if not any(text.scores for text in self.texts):
            lines += [f"{show(name)}\t{'x'.join(map(str, array.shape))}" for name, array in self.arrays.items()]
        notes = [self._times()]
        if any(text.reason == "full" for text in self.texts):
            notes.append("the graph's longest sequence is reached")
        if verbose:
            notes += [
                f"{len(text.prompt)} tokens in, {len(text.tokens)} out, ended by {text.reason or 'itself'}"
                for text in self.texts
            ]
        return Summary("Output", (*([Verbatim("\n".join(lines))] if lines else []), *map(Note, notes)))

    def _times(self) -> str:
        text = f"{self.device}: loaded in {self.load_seconds:.2f} s"
        if self.virtual_tokens:
            text += f", {self.virtual_tokens} virtual tokens"
        if self.new_tokens:
            text += f", first token {self.first_seconds * 1e3:.1f} ms, {self.new_tokens} tokens"
            following, left = self.new_tokens - len(self.texts), self.seconds - self.first_seconds
            text += f", {following / left:.1f} tokens/s" if left > 0 and following > 0 else ""
        return text

    def _lines(self, number: int, text: RunText) -> Iterator[str]:
        if len(self.texts) > 1:
            yield f"> {show(self.inputs[number])}"
        for token, scores in enumerate(text.scores):
            best = sorted(scores.items(), key=lambda pair: -pair[1])[:_BEST]
            place = f"{token}\t" if len(text.scores) > 1 else ""
            yield place + "  ".join(f"{show(label)} {share:.4f}" for label, share in best)
        if text.reason and not text.scores:
            yield ",".join(map(str, text.tokens)) if text.text is None else text.text


def prepare_decoder(
    opened: GraphSession,
    *,
    batch: int,
    max_length: int,
    adapters: StrPath | Sequence[StrPath] = (),
    prompt_adapter: StrPath | None = None,
    prompt: bool = True,
) -> tuple[Decoder, Past | None]:
    """A decoder with adapters in its slots and a soft prompt in front of its rows.

    Args:
        opened: The graph.
        batch: Rows.
        max_length: Most tokens per row besides virtual ones; cut to what the graph takes.
        adapters: ``.onnx_adapter`` files of LoRA factors.
        prompt_adapter: ``.onnx_adapter`` file of a soft prompt, instead of the graph's own.
        prompt: Whether the graph's own soft prompt is used.

    Raises:
        FitError: an adapter that does not fit the graph.
    """
    contract, slots = opened.contract, slot_arrays(choose_adapters(as_list(adapters), opened), opened)
    past = None
    if prompt_adapter is not None:
        check_adapter_file(prompt_adapter, opened.path)
        past = prompt_past(read_adapter_file(prompt_adapter), contract, file=os.fspath(prompt_adapter))
    elif prompt:
        past = default_past(opened)
    whole = max_length + (past.tokens if past else 0)
    decoder = make_decoder(opened, batch=batch, max_length=min(whole, contract.max_length), slots=slots, past=past)
    return decoder, past


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
        batch_size: Most texts or rows that run together; None for all.
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
    if (recordings or start) and not opened.contract.encoder:
        raise FitError(
            f"`{'audio' if recordings else 'start'}=` is for encoder-decoders, which this is not", file=opened.path
        )
    if reads_images(opened) != bool(pictures):
        what = "`images=` is for encoders of images, which this is not" if pictures else "this graph reads images"
        raise FitError(what, file=opened.path, hint=None if pictures else "`images=` takes pixel_values (.npy)")
    texts = bool(words) or any(map(needs_text, batch))
    chosen = choose_adapters(as_list(adapters), opened)
    brought = own_tokenizer(chosen, opened)
    words_of = brought if (brought / "tokenizer.json").exists() else opened.folder
    tokenizer = open_tokenizer(words_of) if texts or ((words_of / "tokenizer.json").exists() and _can()) else None
    template = brought if any((brought / name).exists() for name in _TEMPLATES) else opened.folder
    begins = opened.contract.prompt_kind != TEXT or not prompt or prompt_adapter is not None  # else a text goes on
    given = input_rows(batch, tokenizer, template, begins=begins, chat=chat or bool(system), system=system)
    rows = [row.ids for row in given]
    _check(rows, opened)
    if opened.contract.kind == "encoder":
        if prompt_adapter is not None:
            raise FitError("this encoder takes no soft prompt", file=opened.path)
        slots = slot_arrays(chosen, opened)
        classifier = adapter_labels(chosen.entries)
        pixels, shown = read_images(opened, pictures) if pictures else (None, ())
        given = [InputRow([], []) for _ in shown] or given
        began = time.perf_counter()
        if pixels is None:
            kinds = [row.types for row in given]
            encoded = encode_groups(opened, rows, slots, classifier.problem, kinds, batch_size or len(rows))
        else:
            encoded = look(opened, pixels, slots, classifier.problem)
        seconds, names = time.perf_counter() - began, classifier.names or labels(opened)
        found = tuple(
            RunText(tuple(row.ids), scores=task_scores(opened.contract.task, encoded, number, row, names, tokenizer))
            for number, row in enumerate(given)
        )
        result = RunResult(
            found, opened.memory.device, opened.contract.virtual_tokens, load, seconds, seconds, 0, {**encoded.arrays}
        )
        if shown:
            return replace(result, inputs=shown)
    elif opened.contract.encoder:
        if prompt_adapter is not None:
            raise FitError("an encoder-decoder takes no soft prompt", file=opened.path)
        began = time.perf_counter()
        pair = open_pair(opened, chosen)
        source = heard(pair, recordings) if recordings else rows
        rows = [[]] * len(source) if recordings else rows
        load += time.perf_counter() - began
        size, results = batch_size or len(rows), list[RunResult]()
        for at in range(0, len(rows), size):
            asked: Generation = partial(
                answer,
                pair,
                source[at : at + size],
                max_new=max_new,
                sampling=sampling or Sampling(),
                start=[int(token) for token in start],
                stop=stop_tokens(opened.folder),
            )
            heard_at = None if on_text is None else _shifted(on_text, at)
            results.append(_streamed(opened, rows[at : at + size], tokenizer, load, 0, words, heard_at, asked))
        result = _joined(results)
    else:
        size, results = batch_size or len(rows), list[RunResult]()
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            virtual, generation = _generated(
                opened, some, max_new, sampling or Sampling(), adapters, prompt_adapter, prompt
            )
            heard_at = None if on_text is None else _shifted(on_text, first)
            results.append(_streamed(opened, some, tokenizer, load, virtual, words, heard_at, generation))
        result = _joined(results)
    if recordings:
        return replace(result, inputs=tuple(map(os.fspath, recordings)))
    return replace(result, inputs=tuple(map(said, batch)))


def _shifted(on_text: Callable[[int, str], None], first: int) -> Callable[[int, str], None]:
    """`on_text` for rows that are counted from `first`."""
    return lambda row, text: on_text(first + row, text)


def _joined(results: Sequence[RunResult]) -> RunResult:
    """The results of groups of rows, one after the other."""
    return replace(
        results[0],
        texts=tuple(text for result in results for text in result.texts),
        seconds=sum(result.seconds for result in results),
        new_tokens=sum(result.new_tokens for result in results),
    )


def _generated(
    opened: GraphSession,
    rows: list[list[int]],
    max_new: int,
    sampling: Sampling,
    adapters: StrPath | Sequence[StrPath],
    prompt_adapter: StrPath | None,
    prompt: bool,
) -> tuple[int, Generation]:
    """The number of virtual tokens, and the generation."""
    first, virtual = opened.contract.vocabulary_rows or (0, 0)
    ahead = list(range(first, first + virtual)) if prompt and prompt_adapter is None else []
    longest = max(map(len, rows)) + len(ahead)
    decoder, past = prepare_decoder(
        opened,
        batch=len(rows),
        max_length=longest + max_new,
        adapters=adapters,
        prompt_adapter=prompt_adapter,
        prompt=prompt,
    )
    generation = partial(
        generate,
        decoder,
        [ahead + row for row in rows],
        max_new=max_new,
        sampling=sampling,
        stop=stop_tokens(opened.folder),
    )
    return len(ahead) + (past.tokens if past else 0), generation


def _streamed(
    opened: GraphSession,
    rows: list[list[int]],
    tokenizer: Tokenizer | None,
    load: float,
    virtual: int,
    stop: Sequence[str],
    on_text: Callable[[int, str], None] | None,
    generation: Generation,
) -> RunResult:
    """The result of a generation, timed, its text given out as it comes."""
    streams = [TextStream(tokenizer.decode) for _ in rows] if tokenizer else []
    cuts = [CutText(stop) for _ in rows]
    times: list[float] = []

    def on_token(row: int, token: int) -> bool:
        times.append(time.perf_counter())
        if not streams or (on_text is None and not stop):
            return False
        text = cuts[row].push(streams[row].push(token))
        if text and on_text is not None:
            on_text(row, text)
        return cuts[row].ended

    began = time.perf_counter()
    generations = generation(on_token=on_token)
    ended = time.perf_counter()
    for row, stream in enumerate(streams):
        if (text := cuts[row].close(stream.close())) and on_text is not None:
            on_text(row, text)
    return RunResult(
        tuple(
            RunText(
                tuple(row),
                generation.tokens,
                (cut.text if cut.ended else tokenizer.decode(generation.tokens)) if tokenizer else None,
                generation.reason,
            )
            for row, generation, cut in zip(rows, generations, cuts, strict=True)
        ),
        opened.memory.device,
        virtual,
        load,
        (times[0] if times else ended) - began,
        ended - began,
        sum(len(generation.tokens) for generation in generations),
    )


def _can() -> bool:
    """Whether the package tokenizers is here, where text is welcome but not needed."""
    import importlib.util

    return importlib.util.find_spec("tokenizers") is not None


def _check(rows: list[list[int]], opened: GraphSession) -> None:
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
