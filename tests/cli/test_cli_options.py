# SPDX-License-Identifier: Apache-2.0
"""What words on the command line mean."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery_cli.engines import device
from surgery_cli.options import size, weighted


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("2GB", 2_000_000_000),
        ("512MiB", 512 << 20),
        ("1.5k", 1500),
        ("0.5 GiB", 1 << 29),
        ("3tb", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str, nbytes: int):
    assert size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["0", "-1", "0GB", "0.1", "", "GB", "1XB", "1iB", "nan", "inf", "1e9", "٣", "1_000", "9" * 40]
)
def test_a_text_that_is_no_size_is_refused(text: str):
    with pytest.raises(click.BadParameter):
        size(text)


@given(st.integers(1, 10**18 - 1), st.sampled_from(["", "B"]))
def test_plain_bytes_are_exact(number: int, unit: str):
    assert size(f"{number}{unit}") == number


def test_a_weight_follows_the_last_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weighted("lora") == ("lora", 1.0)
    assert weighted("lora=0.5") == ("lora", 0.5)
    assert weighted("lora=-2") == ("lora", -2.0)
    assert weighted("a=b=1e-3") == ("a=b", 1e-3)
    assert weighted("hf://org/name@rev=0.5") == ("hf://org/name@rev", 0.5)


def test_a_path_with_the_whole_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora=0.5").mkdir()
    (tmp_path / "r=x").mkdir()
    assert weighted("lora=0.5") == ("lora=0.5", 1.0)
    assert weighted("lora=0.5=2") == ("lora=0.5", 2.0)
    assert weighted("r=x") == ("r=x", 1.0)


@pytest.mark.parametrize("text", ["lora=", "lora=much", "lora=nan", "lora=inf", "lora=-inf", "=1"])
def test_a_weight_that_is_no_finite_number_is_refused(text: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter):
        weighted(text)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "mps", "cuda:999"])
def test_a_device_that_does_not_exist_is_refused(text: str):
    with pytest.raises(click.BadParameter):
        device(text)


def test_the_processor_is_always_there():
    assert device("cpu") == "cpu"
    assert device("auto") == "auto"
