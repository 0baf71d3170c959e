# SPDX-License-Identifier: Apache-2.0
"""Supports of a bias belong to a bias of their size."""

from __future__ import annotations

import pytest

from surgery_formats.errors import FitError
from surgery_formats.updates import Fit, GLoRABias
from tests.support.updates import made_factor


@pytest.mark.parametrize("support", ["D", "E"])
def test_a_support_of_another_bias_is_refused(support: str) -> None:
    supports = {"C": (), "D": (), "E": (made_factor(1, 1),), support: (made_factor(24, 1),)}
    update = GLoRABias(**supports)  # type: ignore[arg-type]  # each is a support
    assert update.fitted(Fit((24, 1))).outputs == 24
    with pytest.raises(FitError, match="of 24 elements, and the bias has 12"):
        update.fitted(Fit((12, 1)))
