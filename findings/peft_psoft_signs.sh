#!/usr/bin/env bash
# A PSOFT adapter of PEFT means another model wherever another library decomposes the base.
#
# Versions:  peft 0.21.2, torch 2.13.0 (CPU), numpy 2.4.6.
# Behaviour: a PSOFT file holds a small matrix R that turns singular vectors of the base, `W + s B (R - I) A`. B and A are not in
#            the file: PEFT computes them from the base when it loads. A singular vector has no sign of its own, and R's elements
#            beside the diagonal are right only for the signs of the decomposition in training. LAPACK's implementations (and GPUs)
#            give others. No error is raised.
# Seen:      torch's decomposition: 0.0000 of what training changed away from it
#            numpy's decomposition: 1.1012 of what training changed away from it
# Fails if the same decomposition does not give the model back, or another one does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" peft==0.21.2 torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import tempfile

import numpy
import peft
import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 48), torch.nn.Linear(48, 96)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


model, x = Model(), torch.randn(5, 64)
base = {name: value.clone() for name, value in model.state_dict().items()}
folder = tempfile.mkdtemp()
wrapped = peft.get_peft_model(model, peft.PsoftConfig(target_modules=["first", "second"], r=8, psoft_alpha=8))
for name, value in wrapped.named_parameters():
    if value.requires_grad:
        value.data.add_(0.3 * torch.randn_like(value))
wrapped.save_pretrained(folder)


def attached():
    again = Model()
    again.load_state_dict(base)
    return peft.PeftModel.from_pretrained(again, folder).eval()(x).detach()


trained, same = wrapped.eval()(x).detach(), attached()
torch_svd = torch.linalg.svd
torch.linalg.svd = lambda weight, full_matrices=True: tuple(
    torch.from_numpy(part) for part in numpy.linalg.svd(weight.numpy(), full_matrices=full_matrices)
)
other = attached()
again = Model()
again.load_state_dict(base)
moved = (trained - again(x).detach()).norm()
for name, logits in (("torch's decomposition", same), ("numpy's decomposition", other)):
    print(f"{name}: {((logits - trained).norm() / moved).item():.4f} of what training changed away from it")
assert (same - trained).norm() < 1e-4 * moved
assert (other - trained).norm() > 0.05 * moved
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
