# SPDX-License-Identifier: Apache-2.0
"""What threads may be ahead of an upload by."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from surgery.engine import streaming
from surgery.engine.processes import Stop
from surgery.engine.streaming import _Segment, _Stopped, _Supply, _Window


def supply(number: int, place: int, nbytes: int) -> tuple[_Supply, _Segment]:
    segment = _Segment(place, nbytes, number, place)
    return _Supply(lambda work: None, {0: segment}, first=number), segment


def test_a_weight_far_ahead_waits_and_takes_no_space_from_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_AHEAD", 10)
    window, done = _Window(Stop()), Future[None]()
    done.set_result(None)
    far, near = supply(3, 20, 9), [supply(number, 5 * number, 5) for number in range(3)]
    begun = threading.Thread(target=window.give, args=(*far, memoryview(bytes(9))))
    begun.start()
    for work, segment in near[:2]:
        window.give(work, segment, memoryview(bytes(5)))  # would wait for ever if the other had filled the window
    for work, segment in near:
        if not segment.made:
            window.give(work, segment, memoryview(bytes(5)))
        assert far[1].made == 0
        assert window.take(segment, done) is not None
        assert window.take(segment, done) is None
    assert window.take(far[1], Future()) == bytes(9)  # the upload has come to it, so it may be larger than the window
    begun.join()


def test_who_waits_for_space_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_AHEAD", 10)
    stop = Stop()
    window, stopped = _Window(stop), threading.Event()
    work, segment = supply(1, 20, 9)

    def give() -> None:
        with pytest.raises(_Stopped):
            window.give(work, segment, memoryview(bytes(9)))
        stopped.set()

    begun = threading.Thread(target=give)
    begun.start()
    stop.set()
    while not stopped.is_set():
        window.wake()
    begun.join()
    assert segment.made == 0
