# SPDX-License-Identifier: Apache-2.0
"""Distances fall into the buckets of the original implementations, also far away and on every boundary."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from surgery.onnx.graph.disentangled import rows_of
from surgery.onnx.graph.relative import buckets_of
from surgery.reference.disentangled import row_of
from surgery.reference.relative import relative_bias
from surgery_formats.models.families.recipe import Disentangled, RelativeBias

FAR = 700


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (32, 64), (16, 300), (8, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_distance_has_the_bucket_of_t5(buckets: int, most: int, bidirectional: bool) -> None:
    record = RelativeBias("bias.weight", buckets, most, bidirectional)
    behind = torch.arange(-FAR, FAR + 1)[None]
    expected = T5Attention._relative_position_bucket(behind, bidirectional, buckets, most)
    if bidirectional:
        assert torch.equal(MPNetEncoder.relative_position_bucket(behind, buckets, most), expected)
    assert buckets_of(record)[(behind[0].clamp(-most, most) + most).numpy()].tolist() == expected[0].tolist()
    table = torch.arange(2.0 * buckets).reshape(buckets, 2)
    last = torch.arange(FAR + 1)[None] - FAR
    wanted = T5Attention._relative_position_bucket(last, bidirectional, buckets, most)
    assert torch.equal(relative_bias(record, 1, FAR + 1, lambda _: table), table[wanted].permute(2, 0, 1))


@pytest.mark.parametrize(("buckets", "most"), [(256, 512), (32, 512), (16, 64), (4, 8), (0, 5), (0, 512)])
def test_every_distance_has_the_row_of_deberta(buckets: int, most: int) -> None:
    span = buckets or most
    record = Disentangled("rel_embeddings.weight", span, buckets=buckets, max_distance=most)
    tokens = torch.zeros(1, FAR, 1)
    before = build_relative_position(tokens, tokens, buckets or -1, most)[0]
    expected = (before + span).clamp(0, 2 * span - 1)
    distances = torch.arange(FAR)[:, None] - torch.arange(FAR)
    rows = torch.from_numpy(rows_of(record))
    reach = len(rows) // 2
    assert torch.equal(rows[distances.clamp(-reach, reach) + reach], expected)
    ends = [0, *range(most - 2, most + 2), FAR - 1]
    assert [row_of(record, n) for n in ends] == expected[ends, 0].tolist()
    assert [row_of(record, -n) for n in ends] == expected[0, ends].tolist()
