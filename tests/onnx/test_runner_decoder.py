"""The decoders keep each row what it would be alone: whatever is cached, shared, padded, prefixed or batched.

The reference is one call of onnxruntime over the whole unpadded row without a cache.
"""

from __future__ import annotations

import numpy as np
import pytest

from surgery.onnx.run.adapters import fill_slots, prompt_past
from surgery.onnx.run.decoder import default_past, make_decoder, text_past
from surgery.onnx.run.growing import GrowingDecoder, RowByRow
from surgery.onnx.run.opening import open_graph
from surgery.onnx.run.shared import SharedDecoder
from surgery_formats.errors import FitError
from tests.support.graphs import LONGEST, decoder, factors, plain_logits, prefix

EXACT = 2e-5
ROWS = [[3, 17, 9, 4, 30], [8, 2], [1, 39, 12, 12, 5, 6, 7]]


def follow(decode, rows, path, past=None, steps=6, **more):
    """Prefill and greedy steps; each row's logits are those of the whole row alone."""
    rows = [list(row) for row in rows]
    logits = decode.prefill(rows)
    for _ in range(steps):
        for row, found in zip(rows, logits, strict=True):
            wanted = plain_logits(path, row, past, **more)[-1]
            assert np.abs(found - wanted).max() < EXACT
        tokens = logits.argmax(-1)
        for row, token in zip(rows, tokens, strict=True):
            row.append(int(token))
        logits = decode.step(tokens)
    return rows


@pytest.mark.parametrize("attention", ["grouped", "plain"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS, ROWS[:1] * 6], ids=["one", "three lengths", "six"])
def test_steps_over_a_cache_equal_the_whole_row_at_once(tmp_path, attention, rows):
    path = decoder(tmp_path, attention)
    decode = make_decoder(open_graph(path, device="cpu"), batch=len(rows), max_length=32)
    assert isinstance(decode, SharedDecoder if attention == "grouped" else GrowingDecoder)
    follow(decode, rows, path)
    follow(decode, rows[::-1], path)  # and nothing is left of the rows before


@pytest.mark.parametrize("attention", ["grouped", "plain"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "three lengths"])
def test_a_soft_prompt_stands_before_every_row(tmp_path, attention, rows):
    path = decoder(tmp_path, attention)
    opened = open_graph(path, device="cpu")
    past = prompt_past(prefix(1, 4), opened.contract, file="prompt")
    decode = make_decoder(opened, batch=len(rows), max_length=40, past=past)
    if attention == "plain" and len(rows) > 1:
        assert isinstance(decode, RowByRow)
    follow(decode, rows, path, past.arrays)
    assert decode.lengths.tolist() == [4 + len(row) + 6 for row in rows]
    follow(decode, rows, path, past.arrays)


def test_rows_on_a_soft_prompt_share_a_run_where_the_graph_takes_positions(tmp_path):
    path = decoder(tmp_path, "plain", position_ids=True)
    opened = open_graph(path, device="cpu")
    past = prompt_past(prefix(1, 4), opened.contract, file="prompt")
    decode = make_decoder(opened, batch=3, past=past)
    assert isinstance(decode, GrowingDecoder)
    follow(decode, ROWS, path, past.arrays)
    follow(make_decoder(opened, batch=3), ROWS, path)


@pytest.mark.parametrize("attention", ["grouped", "plain"])
def test_the_default_prompt_can_be_used_omitted_or_swapped(tmp_path, attention):
    path = decoder(tmp_path, attention, prefix=prefix(1, 4))
    opened = open_graph(path, device="cpu")
    past = default_past(opened)
    for name, array in prefix(1, 4).items():
        assert np.array_equal(past.arrays[name], array)
    follow(make_decoder(opened, past=past), ROWS[:1], path, prefix(1, 4))
    follow(make_decoder(opened), ROWS[:1], path)
    other = prompt_past(prefix(2, 7), opened.contract, file="other")
    follow(make_decoder(opened, past=other), ROWS[:1], path, prefix(2, 7))


@pytest.mark.parametrize("attention", ["grouped", "plain"])
def test_a_text_read_once_stands_before_every_row(tmp_path, attention):
    path = decoder(tmp_path, attention)
    opened = open_graph(path, device="cpu")
    text = [7, 1, 22, 4]
    decode = make_decoder(opened, batch=3, past=text_past(opened, text))
    logits = decode.prefill(ROWS)
    for row, found in zip(ROWS, logits, strict=True):
        assert np.abs(found - plain_logits(path, text + row)[-1]).max() < EXACT


def test_grouped_attention_with_a_growing_cache_runs(tmp_path):
    from dataclasses import replace

    from tests.support.graphs import CONTRACT

    path = decoder(tmp_path, contract=replace(CONTRACT, cache="growing"))
    opened = open_graph(path, device="cpu")
    decode = make_decoder(opened, batch=3)
    assert isinstance(decode, GrowingDecoder)
    follow(decode, ROWS, path)
    past = prompt_past(prefix(1, 4), opened.contract, file="prompt")
    decode = make_decoder(opened, batch=3, past=past)
    assert not isinstance(decode, SharedDecoder)
    follow(decode, ROWS, path, past.arrays)


def test_a_long_prefill_goes_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.onnx.run.shared._CHUNK", 3)
    path = decoder(tmp_path)
    decode = make_decoder(open_graph(path, device="cpu"), batch=3)
    run, widths = decode._run, []

    def watched(rows_of_cache, rows):
        widths.append(max(map(len, rows)))
        return run(rows_of_cache, rows)

    monkeypatch.setattr(decode, "_run", watched)
    follow(decode, ROWS, path, steps=1)
    assert len(widths) > len(ROWS)
    assert max(widths) <= 3 < max(map(len, ROWS))


def test_shared_buffers_stay_where_they_are(tmp_path):
    """Bound once: a step neither binds nor allocates; the cache written is the cache read."""
    path = decoder(tmp_path)
    decode = make_decoder(open_graph(path, device="cpu"), max_length=32)
    decode.prefill(ROWS[:1])
    binding, addresses = decode._step, [buffer.address for buffer in decode._cache.values()]
    before = decode._graph.memory.read(addresses[0], decode._row).copy()
    decode.step([5])
    after = decode._graph.memory.read(addresses[0], decode._row)
    assert decode._step is binding
    assert [buffer.address for buffer in decode._cache.values()] == addresses
    changed = (before.reshape(2, 32, -1) != after.reshape(2, 32, -1)).any((0, 2))
    assert changed.nonzero()[0].tolist() == [5]  # one place of each head, behind the five of the row


@pytest.mark.parametrize("attention", ["grouped", "plain"])
def test_adapters_fill_slots_and_add_up(tmp_path, attention):
    path = decoder(tmp_path, attention, slots=True)
    opened = open_graph(path, device="cpu")
    one, two = factors(3, 2), factors(4, 5)
    follow(make_decoder(opened), ROWS[:1], path)
    for adapters in ([one], [two], [one, two]):
        slots = fill_slots(
            [(f"adapter {n}", arrays) for n, arrays in enumerate(adapters)], opened.contract, opened.inputs
        )
        more = {
            name: np.concatenate([arrays[name] for arrays in adapters], 1 if name.endswith("A") else 0) for name in one
        }
        decode = make_decoder(opened, slots=slots)
        adapted = follow(decode, ROWS[:1], path, **more)
        assert np.abs(plain_logits(path, adapted[0]) - plain_logits(path, adapted[0], **more)).max() > 0.1


def test_a_full_cache_is_an_error_and_not_an_overrun(tmp_path):
    decode = make_decoder(open_graph(decoder(tmp_path), device="cpu"), max_length=6)
    decode.prefill(ROWS[:1])
    decode.step([1])
    assert decode.room == 0
    with pytest.raises(FitError, match="full"):
        decode.step([1])
    with pytest.raises(FitError, match="do not fit"):
        decode.prefill(ROWS[2:])


def test_adapters_and_prompts_that_do_not_fit_are_refused(tmp_path):
    opened = open_graph(decoder(tmp_path, slots=True), device="cpu")
    with pytest.raises(FitError, match="positions end at 64"):
        make_decoder(opened, max_length=LONGEST + 1)
    wrong = prefix(1, 4)
    wrong["past_key_values.0.key"] = wrong["past_key_values.0.key"][:, :1]
    with pytest.raises(FitError, match=r"\[1, 2, tokens, 16\]"):
        prompt_past(wrong, opened.contract, file="wrong")
    with pytest.raises(FitError, match=r"no array for past_key_values\.1\.value"):
        prompt_past(dict(list(prefix(1, 4).items())[:-1]), opened.contract, file="half")
    with pytest.raises(FitError, match="other half"):
        fill_slots([("half", {"q0.lora_A": factors(3, 2)["q0.lora_A"]})], opened.contract, opened.inputs)
    with pytest.raises(FitError, match="no such slot"):
        fill_slots([("other", {"k0.lora_A": factors(3, 2)["q0.lora_A"]})], opened.contract, opened.inputs)
    with pytest.raises(FitError, match="the slot takes"):
        fill_slots(
            [("shape", {**factors(3, 2), "q0.lora_B": factors(3, 3)["q0.lora_B"]})], opened.contract, opened.inputs
        )
    half = {name: array.astype(np.float16) for name, array in factors(3, 2).items()}
    with pytest.raises(FitError, match="float16"):
        fill_slots([("type", half)], opened.contract, opened.inputs)
