# SPDX-License-Identifier: Apache-2.0
"""One answer of an encoder-decoder: what was read, what the decoder begins with, and what it goes on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.engine.inputs import StrPath
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.onnx.run.chosen_adapters import ChosenAdapters, is_same_file, slot_arrays
from surgery.onnx.run.encoder import encode, run_encoder
from surgery.onnx.run.generate import Continuation, generate
from surgery.onnx.run.opening import GraphSession, open_encoder
from surgery.onnx.run.pair import EncoderStates, PairDecoder
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.sampling import Sampling
from surgery.onnx.run.spectrogram import read_sound
from surgery.onnx.run.starts import Starts, read_starts
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.text import show

__all__ = ["FEATURES", "PairSessions", "answer", "heard", "open_pair", "sound_sizes"]

Array = npt.NDArray[Any]

FEATURES = "input_features"
"""The input of an encoder of sound."""


@dataclass(frozen=True, eq=False)
class PairSessions:
    """The sessions of an encoder-decoder, and the arrays of adapters for each."""

    encoder: GraphSession
    decoder: GraphSession
    encoder_slots: Mapping[str, Array]
    decoder_slots: Mapping[str, Array]

    @property
    def reads_sound(self) -> bool:
        """Whether its encoder takes a spectrogram instead of tokens."""
        return FEATURES in self.encoder.inputs


def open_pair(decoder: GraphSession, chosen: ChosenAdapters) -> PairSessions:
    """Open the encoder of `decoder`, and sort adapters: an export writes a file for each of the two.

    That of the encoder lies beside the other, which the graph's contract names; or it is given by itself.

    Raises:
        FitError: an adapter that does not fit; see `surgery.onnx.run.opening`.
    """
    encoder = open_encoder(decoder)
    known = {*encoder.contract.slot_inputs, *encoder.contract.replaceable}
    theirs: list[tuple[StrPath, float]] = []
    own: list[tuple[StrPath, float]] = []
    for path, strength in chosen.files:
        names = read_adapter_file(path).keys()
        if names and names <= known and not names <= decoder.inputs.keys():
            theirs.append((path, strength))
            continue
        own.append((path, strength))
        other = _encoders_part(decoder, Path(path))
        if other is not None and not any(is_same_file(other, file) for file, _ in chosen.files):  # given too: once
            theirs.append((other, strength))
    slots = (
        slot_arrays(replace(chosen, files=tuple(files)), graph) for files, graph in ((theirs, encoder), (own, decoder))
    )
    return PairSessions(encoder, decoder, *slots)


def _encoders_part(decoder: GraphSession, file: Path) -> Path | None:
    """The file of an adapter for the encoder: the one that the contract names, or for a copy the one beside the copy.

    Raises:
        MalformedError: the contract names a file outside the folder.
        NotFoundError: the contract names one of this name, and there is none.
    """
    for entry in decoder.contract.adapters:
        own, part = entry.get("file"), entry.get("encoder_file")
        if not isinstance(own, str) or not isinstance(part, str) or Path(own).name != file.name:
            continue
        if not is_safe_name(part):
            raise MalformedError(f"the graph refers to '{show(part)}' for an adapter", file=decoder.path)
        found = decoder.folder / part if is_same_file(decoder.folder / own, file) else file.with_name(Path(part).name)
        if not found.exists():
            raise NotFoundError("the adapter's part for the encoder is not there", file=found, hint="copy both files")
        return found
    beside = file.with_name(f"{file.stem}.encoder{file.suffix}")
    return beside if beside.exists() else None


def heard(pair: PairSessions, files: Sequence[Path]) -> Array:
    """The spectrograms of recordings, ``(B, bins, frames)``.

    Raises:
        FitError: the model reads text; see `surgery.onnx.run.spectrogram.read_sound`.
    """
    bins, frames = sound_sizes(pair.encoder)
    return np.stack([read_sound(Path(file), bins, frames) for file in files])


def sound_sizes(encoder: GraphSession) -> tuple[int, int]:
    """Values per frame, and frames, of the spectrogram that an encoder reads.

    Raises:
        FitError: it reads none, or of any size.
    """
    port = encoder.inputs.get(FEATURES)
    if port is None:
        raise FitError("this model reads text, not sound", file=encoder.path)
    _, bins, frames = port.shape
    if not isinstance(bins, int) or not isinstance(frames, int):
        raise FitError("the graph does not say how large its spectrograms are", file=encoder.path)
    return bins, frames


def answer(
    pair: PairSessions,
    source: Rows | Array,
    *,
    max_new: int,
    sampling: Sampling,
    start: Sequence[int] = (),
    stop: frozenset[int] = frozenset(),
    on_token: Callable[[int, int], object] | None = None,
) -> tuple[Continuation, ...]:
    """Answer rows of token ids, or spectrograms ``(B, bins, frames)``.

    Args:
        pair: The model.
        source: What the encoder reads.
        max_new: Most new tokens of each row, behind those that its decoder begins with.
        sampling: How tokens are chosen.
        start: The decoder's first ids; by default those of the configuration beside the graph.
        stop: Ids that end a row.
        on_token: Called with row and token as they come.

    Raises:
        FitError: see `surgery.onnx.run.pair` and `surgery.onnx.run.starts`.
    """
    decoder = pair.decoder
    read = _listened(pair, source) if isinstance(source, np.ndarray) else _read(pair, source)
    starts = read_starts(decoder.folder, start).within(decoder.contract.vocabulary)
    length = min(decoder.contract.max_length, len(starts.tokens) + max_new)

    def ask(rows: Rows) -> Array:
        whole = decoder.contract.max_length
        return PairDecoder(decoder, read, whole, pair.decoder_slots, Starts(starts.tokens)).prefill(rows)

    rows = starts.rows(len(read.values), ask)
    answering = PairDecoder(decoder, read, length, pair.decoder_slots, starts)
    return generate(answering, rows, max_new=max_new, sampling=sampling, stop=stop, on_token=on_token)


def _read(pair: PairSessions, rows: Rows) -> EncoderStates:
    if pair.reads_sound:
        raise FitError("this model reads sound, not text", file=pair.decoder.path, hint="`audio=` names a recording")
    encoded = encode(pair.encoder, rows, pair.encoder_slots)
    width = max(encoded.lengths)
    mask = (np.arange(width) < np.array(encoded.lengths)[:, None]).astype(np.int64)
    return EncoderStates(encoded.arrays["last_hidden_state"], mask)


def _listened(pair: PairSessions, features: Array) -> EncoderStates:
    return EncoderStates(run_encoder(pair.encoder, {FEATURES: features}, pair.encoder_slots)["last_hidden_state"])
