#!/usr/bin/env bash
# transformers 5 gives a EuroBERT classifier other scores than it was trained for: it does not read the key its pooling stands under.
#
# Versions:  transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0.
# Behaviour: EuroBERT's own code, which came with its checkpoints for a year before transformers had the model, keeps the pooling of a
#            classifier in `config.json` as `clf_pooling` ("late", "mean" or "bos"). transformers reads `classifier_pooling`, and
#            keeps the other key as an attribute that nothing looks at. Weights have the same names, so the model loads whole, without
#            a warning, and pools "late" whatever it was trained with.
# Seen:      late: scores 0 from those under classifier_pooling
#            mean: scores 0.91 from those under classifier_pooling, of up to 0.94; no key missing or left over
#            bos: scores 3.2 from those under classifier_pooling, of up to 3.4; no key missing or left over
# Fails if mean or bos are the same under both keys. (The figures depend on the seed.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" transformers==5.23.0 torch==2.13.0 safetensors==0.8.0
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import torch
from transformers import AutoModelForSequenceClassification, EuroBertConfig, EuroBertForSequenceClassification

ids = torch.tensor([[2, 5, 17, 3, 41]])
heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
apart = {}
for pooling in ("late", "mean", "bos"):
    folder = pathlib.Path(sys.argv[1], pooling)
    torch.manual_seed(1)
    trained = EuroBertForSequenceClassification(
        EuroBertConfig(**small, **heads, num_labels=3, classifier_pooling=pooling)
    ).eval()
    for parameter in trained.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    trained.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["clf_pooling"] = config.pop("classifier_pooling")
    (folder / "config.json").write_text(json.dumps(config))
    loaded, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert loaded.config.clf_pooling == pooling
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        wanted, scores = trained(ids).logits, loaded.eval()(ids).logits
    apart[pooling] = float((scores - wanted).abs().max())
    more = f", of up to {wanted.abs().max():.2g}; no key missing or left over" if apart[pooling] else ""
    print(f"{pooling}: scores {apart[pooling]:.2g} from those under classifier_pooling{more}")
assert apart["late"] < 1e-5
assert apart["mean"] > 0.1
assert apart["bos"] > 0.1
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
