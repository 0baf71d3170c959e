#!/usr/bin/env bash
# onnxruntime makes numbers of constant fp8 weights in every run, unless an option that speaks of something else is set.
#
# Versions:  onnxruntime 1.32.0 (CPU; 1.23.2 and 1.31.1 too), onnx 1.23.2, numpy 2.4.6.
# Behaviour: onnxruntime folds nodes of constants as it loads a model, but not DequantizeLinear, which it keeps to fuse it with a
#            product. For float8 there is no such product on a CPU, so the node stays, and a token through one matrix takes tens of
#            times as long as its product. `session.disable_quant_qdq`, by name the option that turns such fusions off, has the
#            node folded. Results are equal. Nothing is logged.
# Seen:      1.32.0: a token times 1,024 x 1,024 codes of fp8: DequantizeLinear runs 5 times in 5 runs; folded: 0 times
#            with it 46 times as long as without (2.2 and 0.047 ms), 2e-05 apart of up to 30
# Fails if the node is not run, runs with the option, results differ, or it takes less than 4 times as long. (Times depend on the machine.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys
import time

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WIDTH, RUNS = 1024, 5
numbers = numpy.random.default_rng(0)
codes = numbers.integers(0, 0x70, (WIDTH, WIDTH), "u1") | numbers.integers(0, 2, (WIDTH, WIDTH), "u1") << 7
weights = [
    helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, codes.shape, codes.tobytes(), raw=True),
    numpy_helper.from_array(numpy.full(WIDTH, 0.01, "f4"), "scales"),
]
nodes = [
    helper.make_node("DequantizeLinear", ["codes", "scales"], ["numbers"], axis=1),
    helper.make_node("MatMul", ["x", "numbers"], ["y"]),
]
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in "xy")
model = helper.make_model(
    helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
)
onnx.checker.check_model(model, full_check=True)
token = {"x": numbers.standard_normal((1, WIDTH), "f4")}


def session(folded, profile=""):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if folded:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def computed(folded):
    made = session(folded, f"{sys.argv[1]}/profile")
    for _ in range(RUNS):
        made.run(None, token)
    events = json.loads(pathlib.Path(made.end_profiling()).read_text())
    return sum(
        event["name"].endswith("_kernel_time") and event["args"]["op_name"] == "DequantizeLinear"
        for event in events
        if event["cat"] == "Node"
    )


def quickest(made):
    took = []
    for _ in range(50):
        start = time.perf_counter()
        made.run(None, token)
        took.append(time.perf_counter() - start)
    return min(took) * 1e3


kept, folded = computed(False), computed(True)
sessions = session(False), session(True)
slow, fast = map(quickest, sessions)
one, two = (made.run(None, token)[0] for made in sessions)
difference = abs(one - two).max()
print(
    f"{onnxruntime.__version__}: a token times 1,024 x 1,024 codes of fp8: DequantizeLinear runs {kept} times in {RUNS} runs; "
    f"folded: {folded} times\n"
    f"with it {slow / fast:.0f} times as long as without ({slow:.2g} and {fast:.2g} ms), {difference:.1g} apart of up to "
    f"{abs(two).max():.2g}"
)
assert (kept, folded) == (RUNS, 0)
assert difference < 1e-5 * abs(two).max()
assert slow > 4 * fast
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
