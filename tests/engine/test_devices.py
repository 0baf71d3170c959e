# SPDX-License-Identifier: Apache-2.0
"""Names of devices, and which of them a verb takes where that is left open."""

import pytest
import torch

from surgery.engine.devices import device_of, devices_of, extraction_devices
from surgery_formats.errors import FitError


@pytest.mark.parametrize(
    "text", ["gpu", "cuda:", "cuda:0,", "cuda:0,0", "cuda:99", "cpu,cuda", "cuda:all,0", "", "cuda:-1"]
)
def test_a_device_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(FitError, match=r"device|machine"):
        devices_of(text)


def test_devices_are_listed_by_number_or_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cpu") == ("cpu",)
    assert devices_of("cuda") == ("cuda:0",)
    assert devices_of("cuda:2,0") == ("cuda:2", "cuda:0")
    assert devices_of("cuda:all") == devices_of("auto") == ("cuda:0", "cuda:1", "cuda:2")


def test_auto_takes_gpus_for_models_that_are_sooner_done_there_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    small, large = extraction_devices("auto", 900_000_000), extraction_devices("auto", 8_000_000_000)
    assert small.names == ("cpu",)
    assert "below 1.0 B" in small.why
    assert large.names == ("cuda:0", "cuda:1")
    assert large.why
    assert extraction_devices("cuda", 1000) == (("cuda:0",), ""), "a choice needs no reason"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extraction_devices("auto", 8_000_000_000) == (("cpu",), "no GPU is here")
    assert device_of("auto") == "cpu"
