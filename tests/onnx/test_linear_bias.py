# SPDX-License-Identifier: Apache-2.0
"""ALiBi over hundreds of tokens, where bfloat16 no longer holds every position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.reference import forward, open_reference
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.families.alibi import bloom_slopes, mpt_slopes
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain

TOKENS = 420


@pytest.mark.parametrize("name", ["falcon_rw", "bloom_six_heads", "mpt_six_heads"])
def test_long_texts_match_transformers(name, tmp_path):
    fields = {"max_seq_len": 512} if "mpt" in name else {} if "bloom" in name else {"max_position_embeddings": 512}
    base = recipes.build(name, tmp_path / "base", **fields)
    ids = np.random.default_rng(5).integers(3, recipes.VOCAB, (1, TOKENS))
    expected = trained.logits(recipes.load(name, base), ids)
    export_onnx(base, output=tmp_path / "out", target="portable", dtype="fp32", max_length=512)
    found = Plain(tmp_path / "out" / "model.onnx").step(ids, np.ones_like(ids))
    assert np.abs(found - expected).max() <= 1e-4
    ours = forward(open_reference(open_checkpoint(base).main), torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-4


def test_slopes_of_any_number_of_heads_are_those_of_transformers():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in (1, 2, 3, 6, 8, 12, 16, 71):
        ours, theirs = bloom_slopes(heads), build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        assert np.allclose(ours, theirs.numpy(), rtol=1e-5)
        assert np.allclose(mpt_slopes(heads), -build_mpt_alibi_tensor(heads, 2)[:, 0, 0].numpy(), rtol=1e-5)
