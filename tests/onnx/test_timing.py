# SPDX-License-Identifier: Apache-2.0
"""Two sides measured in turns: what slows both alike leaves their ratio alone."""

from __future__ import annotations

import numpy as np
import pytest

from surgery.onnx.run import timing
from surgery.onnx.run.timing import BLOCK, Timing, cache_length, compare, measure


class Clock:
    """A machine that becomes slower all the time, up to five times."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def side(self, name, cost):
        clock = self

        class Side:
            steps, room, switch, lengths = 0, 9, 0, np.zeros(1)

            def prefill(self, rows=None):
                clock.now += 10 * cost
                clock.calls.append(name.upper())

            def step(self, tokens):
                assert np.shape(tokens) == (3,)
                self.steps += 1
                clock.now += cost * (1 + clock.now / 500)
                clock.calls.append(name)

        return Side()


def test_the_ratio_of_two_sides_survives_a_machine_that_slows_down(monkeypatch):
    clock = Clock(monkeypatch)
    a, b = clock.side("a", 1.0), clock.side("b", 1.02)
    one, other = measure([a.prefill, b.prefill], [a, b], 98, batch=3, repeats=4)
    assert [len(block) for block in one.blocks] == [BLOCK] * 20
    assert max(map(max, one.blocks)) > 1.5 * min(map(min, one.blocks))
    prefill, token = compare(other, one)
    assert prefill.median == pytest.approx(1.02)
    assert token.median == pytest.approx(1.02, abs=0.003)
    assert token.low < 1.02 < token.high
    assert token.pairs == 20
    assert cache_length(7, 98) == 7 + a.steps == 7 + b.steps
    first = "BA" + "ABBA" * 2 + "aaabbb"  # rounds begin with each side in turn; the first one is for warmth
    assert "".join(clock.calls) == first + ("a" * 6 + "b" * 6 + "b" * 6 + "a" * 6) * 10


def test_an_encoder_has_runs_and_no_steps():
    done = []
    (found,) = measure([lambda: done.append(1)], [None], 50, repeats=3)
    assert (len(found.prefills), found.blocks, found.token, len(done)) == (3, (), None, 4)
    assert compare(found, found)[1] is None
    assert compare(Timing((1.0, 3.0), ()), Timing((1.0, 1.0), ()))[0].median == 2.0
