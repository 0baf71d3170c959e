#!/usr/bin/env bash
# Whether safetensors.numpy reads a bfloat16 file depends on what else the process has imported.
#
# Versions:  safetensors 0.8.0, numpy 2.4.6, ml_dtypes 0.6.0.
# Behaviour: `load_file` of a valid file with one BF16 tensor raises TypeError, although ml_dtypes is installed. After
#            `import ml_dtypes` the same call returns an array of dtype bfloat16. The type is looked up in numpy by name,
#            and numpy knows the name only once ml_dtypes has registered it.
# Seen:      before: TypeError data type 'bfloat16' not understood
#            after:  bfloat16 [1.0, 2.0]
# Fails if either of the two calls behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
  safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cat > "$folder/look.py" <<'PY'
import json
import struct
import sys

from safetensors.numpy import load_file

path = sys.argv[1]
header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
header += b" " * (-len(header) % 8)
with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + struct.pack("<2H", 0x3F80, 0x4000))

try:
    load_file(path)
    sys.exit("before: it was read")
except TypeError as error:
    print("before: TypeError", error)
    assert "bfloat16" in str(error), error

import ml_dtypes  # noqa: E402, F401

values = load_file(path)["w"]
print("after: ", values.dtype, values.astype("float32").tolist())
assert str(values.dtype) == "bfloat16" and values.astype("float32").tolist() == [1.0, 2.0]
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder/one.safetensors"
