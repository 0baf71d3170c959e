# SPDX-License-Identifier: Apache-2.0
"""Running encoder-decoders: what their decoders begin with, what they never say, and sound from files."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
import torch
import transformers

import surgery
from surgery.onnx.run.pair import PairDecoder
from surgery.onnx.run.spectrogram import log_mel, read_sound
from surgery.onnx.run.starts import Starts, read_starts
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from tests.oracles import recipes

SOUND = np.random.default_rng(3).normal(size=(2, 5, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Base and graphs of a tiny model of speech."""
    folder = tmp_path_factory.mktemp("whisper")
    recipes.build("whisper", folder / "base")
    surgery.export_onnx(folder / "base", output=folder / "out")
    for number, spectrogram in enumerate(SOUND):
        np.save(folder / f"{number}.npy", spectrogram)
    return folder


def settings(folder, **values):
    """Settings of generation beside a graph."""
    path = folder / "generation_config.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


def test_suppressed_tokens_and_forced_ones_are_those_of_transformers(whisper):
    base, out = whisper / "base", whisper / "out"
    plain = surgery.run(out, audio=[whisper / "0.npy", whisper / "1.npy"], max_new=8)
    often = plain.texts[0].tokens[0]
    known = {"lang_to_id": {"<|en|>": 11, "<|de|>": 12}, "task_to_id": {"transcribe": 13, "translate": 14}}
    values = {
        **known,
        "suppress_tokens": [often],
        "begin_suppress_tokens": [20],
        "no_timestamps_token_id": 15,
        "is_multilingual": True,
        "decoder_start_token_id": 2,
        "max_length": 40,
    }
    for folder in (base, out):
        settings(folder, **values)
    model = recipes.load("whisper", base)
    features = torch.from_numpy(SOUND)
    for more in ({}, {"language": "de", "task": "translate"}, {"language": "<|en|>"}):
        settings(out, **{"language": None, "task": None, **more})
        found = surgery.run(out, audio=[whisper / "0.npy", whisper / "1.npy"], max_new=8)
        first = [11 if more.get("language") == "<|en|>" else 12] if more else None
        wanted = _greedy(model, features, values, first, more)
        assert [list(text.tokens) for text in found.texts] == wanted
        assert often not in {token for text in found.texts for token in text.tokens}
    told = surgery.run(out, audio=whisper / "0.npy", start=[2, 12, 14, 15], max_new=8)
    assert told.texts[0].tokens != plain.texts[0].tokens
    assert often not in told.texts[0].tokens


def test_recordings_are_answered_in_groups_as_together(whisper, monkeypatch):
    files, heard = [whisper / "0.npy", whisper / "1.npy", whisper / "0.npy"], []
    prefill = PairDecoder.prefill
    monkeypatch.setattr(PairDecoder, "prefill", lambda self, rows: heard.append(len(rows)) or prefill(self, rows))
    together = surgery.run(whisper / "out", audio=files, start=[2], max_new=5)
    parted = surgery.run(whisper / "out", audio=files, start=[2], max_new=5, batch_size=2)
    assert (heard, parted.texts, parted.new_tokens) == ([3, 2, 1], together.texts, together.new_tokens)


def test_ids_that_are_none_of_the_vocabulary(whisper):
    with pytest.raises(FitError, match="begin with -3"):
        surgery.run(whisper / "out", audio=whisper / "0.npy", start=[2, -3], max_new=2)
    with pytest.raises(FitError, match="begin with 9999, beyond"):
        surgery.run(whisper / "out", audio=whisper / "0.npy", start=[2, 9999], max_new=2)
    starts = Starts((2,), frozenset({5, 9999}), frozenset({7, 9999})).within(100)
    assert (starts.never, starts.never_first) == ({5}, {7})


def _greedy(model, features, values, languages, more):
    """Greedy tokens from transformers' own choice of first ids."""
    generation = model.generation_config
    for key, value in values.items():
        setattr(generation, key, value)
    generation.language, generation.task, generation.return_timestamps = more.get("language"), more.get("task"), False
    options = {"input_features": features, "batch_size": 2, "generation_config": generation, "config": model.config}
    first = model._retrieve_init_tokens(**options, num_segment_frames=24, kwargs={})
    assert languages is None or first[0, 1] == languages[0]
    rows = []
    with torch.no_grad():
        for row in range(2):
            ids, new = first[row : row + 1], []
            for step in range(8):
                logits = model(input_features=features[row : row + 1], decoder_input_ids=ids).logits[0, -1]
                logits[
                    [*values["suppress_tokens"], *(values["begin_suppress_tokens"] if not step else [])]
                ] = -torch.inf
                token = int(logits.argmax())
                if token == model.config.eos_token_id:
                    break
                new.append(token)
                ids = torch.cat((ids, torch.tensor([[token]])), 1)
            rows.append(new)
    return rows


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"decoder_start_token_id": 3}, (3,)),
        ({"bos_token_id": 4}, (4,)),
        ({"decoder_start_token_id": 3, "forced_bos_token_id": 9}, (3, 9)),
        ({"decoder_start_token_id": 3, "forced_decoder_ids": [[1, 8], [2, 7]]}, (3, 8, 7)),
        ({"decoder_start_token_id": 3, "forced_decoder_ids": [[1, 8]], "no_timestamps_token_id": 6}, (3, 8, 6)),
    ],
)
def test_first_ids_come_from_the_configuration(tmp_path, values, wanted):
    settings(tmp_path, **values)
    assert read_starts(tmp_path).tokens == wanted


def test_bad_words_of_one_token_are_never_said(tmp_path):
    """Marian's padding token, with which its decoder begins."""
    settings(tmp_path, decoder_start_token_id=9, bad_words_ids=[[9], [3, 4]], suppress_tokens=[5, -1])
    assert read_starts(tmp_path).never == {5, 9}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "decoder_start_token_id"),
        ({"decoder_start_token_id": 3, "forced_decoder_ids": [[2, 8]]}, "forced_decoder_ids"),
        ({"decoder_start_token_id": 3, "lang_to_id": {"<|en|>": 5}, "language": "fr"}, "lang_to_id"),
    ],
)
def test_a_configuration_that_names_no_first_ids_is_refused(tmp_path, values, words):
    settings(tmp_path, **values)
    with pytest.raises(FitError, match=words):
        read_starts(tmp_path)


def recording(path, samples, rate=16000, width=2):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("bins", [80, 128])
def test_spectrograms_are_those_of_the_feature_extractor(tmp_path, bins):
    times = np.arange(16000 * 2) / 16000
    samples = 0.4 * np.sin(2 * np.pi * 300 * times * (1 + times)) + 0.01 * np.random.default_rng(1).normal(
        size=len(times)
    )
    found = read_sound(recording(tmp_path / "a.wav", samples), bins, 3000)
    heard = (samples * 32767).astype("<i2").astype(np.float32) / 32768
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    wanted = extractor(heard, sampling_rate=16000, return_tensors="np").input_features[0]
    assert found.shape == wanted.shape == (bins, 3000)
    assert np.abs(found - wanted).max() <= 1e-4
    assert np.array_equal(found, log_mel(heard, bins, 3000))


def test_sound_that_is_not_read_is_refused(tmp_path, whisper):
    out = whisper / "out"
    silence = np.zeros(1600, np.float32)
    with pytest.raises(NotFoundError):
        surgery.run(out, audio=tmp_path / "none.wav")
    with pytest.raises(FitError, match="16000 Hz"):
        surgery.run(out, audio=recording(tmp_path / "a.wav", silence, rate=8000))
    with pytest.raises(FitError, match="reads 0 s at once"):
        surgery.run(out, audio=recording(tmp_path / "b.wav", np.zeros(16000, np.float32)))
    np.save(tmp_path / "c.npy", np.zeros((5, 23), np.float32))
    with pytest.raises(FitError, match=r"\[5, 24\]"):
        surgery.run(out, audio=tmp_path / "c.npy")
    (tmp_path / "d.npy").write_bytes(b"no array")
    with pytest.raises(MalformedError):
        surgery.run(out, audio=tmp_path / "d.npy")
    (tmp_path / "e.mp3").write_bytes(b"")
    with pytest.raises(FitError, match="wav"):
        surgery.run(out, audio=tmp_path / "e.mp3")
    with pytest.raises(FitError, match="reads sound"):
        surgery.run(out, [[3, 4]])
    with pytest.raises(FitError, match="at once"):
        surgery.run(out, [[3, 4]], audio=whisper / "0.npy")
    with pytest.raises(FitError, match="beyond its vocabulary"):
        surgery.run(out, audio=whisper / "0.npy", start=[99])


def test_the_encoder_lies_beside_its_decoder_in_any_layout(tmp_path):
    base = recipes.build("marian", tmp_path / "base")
    found = []
    for layout in ("plain", "transformers.js"):
        surgery.export_onnx(base, output=tmp_path / layout, layout=layout, weights="embed")
        found.append(surgery.run(tmp_path / layout, [[3, 4, 5]], max_new=4, device="cpu").texts)
    assert found[0] == found[1]


def test_text_models_take_no_sound(tmp_path):
    surgery.export_onnx(recipes.build("marian", tmp_path / "base"), output=tmp_path / "pair")
    np.save(tmp_path / "a.npy", SOUND[0])
    with pytest.raises(FitError, match="reads text"):
        surgery.run(tmp_path / "pair", audio=tmp_path / "a.npy")
    surgery.export_onnx(recipes.build("llama", tmp_path / "llama"), output=tmp_path / "decoder")
    with pytest.raises(FitError, match="encoder-decoders"):
        surgery.run(tmp_path / "decoder", [[3, 4]], start=[5])
