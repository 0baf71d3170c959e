# SPDX-License-Identifier: Apache-2.0
"""The base whose graphs are merged into."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.graphs_by_value import base_of
from tests.support.merged_graphs import WEIGHTS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("base"), WEIGHTS)
