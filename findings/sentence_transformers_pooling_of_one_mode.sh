#!/usr/bin/env bash
# A pooling that names one mode alone gives embeddings twice as wide in sentence-transformers 5 as in 6, without an error.
#
# Versions:  sentence-transformers 5.1.2 with transformers 4.57.6 and 6.2.0 with 5.23.0, torch 2.13.0 (CPU).
# Behaviour: a model's `1_Pooling/config.json` of old says `pooling_mode_cls_token: true` and the like. 5.1.2 has the mean besides
#            unless `pooling_mode_mean_tokens` is false, and puts both side by side. 6.2.0 reads the modes that are named. The file says
#            the same width in both, and an index made with one release does not fit the other's queries. With the mean named as
#            false both give the same.
# Seen:      5.1.2: first token alone: 16 values, the mean in the last 8; mean named as false: 8 values, of the first token
#            6.2.0: first token alone: 8 values, of the first token; mean named as false: 8 values, of the first token
# Fails if one of these is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import sentence_transformers
import torch
from sentence_transformers.models import Pooling

torch.manual_seed(0)
states = torch.randn(1, 3, 8)
named = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True}
cases = {
    "first token alone": named,
    "mean named as false": named | {"pooling_mode_mean_tokens": False},
}
seen = []
for title, config in cases.items():
    pathlib.Path(sys.argv[1], "config.json").write_text(json.dumps(config))
    given = {"token_embeddings": states.clone(), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    pooled = Pooling.load(sys.argv[1])(given)["sentence_embedding"][0]
    assert torch.equal(pooled[:8], states[0, 0])
    more = pooled[8:]
    assert not len(more) or torch.allclose(more, states[0].mean(dim=0), atol=1e-6)
    kind = "the mean in the last 8" if len(more) else "of the first token"
    seen.append(f"{title}: {len(pooled)} values, {kind}")
version = sentence_transformers.__version__
print(f"{version}: {'; '.join(seen)}")
widths = [int(line.split(": ")[1].split()[0]) for line in seen]
assert widths == {"5.1.2": [16, 8], "6.2.0": [8, 8]}[version]
PY
for pair in "5.1.2 4.57.6" "6.2.0 5.23.0"; do
    read -r version transformers <<< "$pair"
    python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
        sentence-transformers==$version transformers==$transformers torch==2.13.0
    PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
    rm -r "$folder/site"
done
