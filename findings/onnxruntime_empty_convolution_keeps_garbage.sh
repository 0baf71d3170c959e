#!/usr/bin/env bash
# A convolution over no channels gives NaN in onnxruntime, if NaN or Inf lay in the memory that its result gets.
#
# Versions:  onnxruntime 1.31.1 (CPU; 1.22.0 and 1.30.0 too; not seen with 1.32.0), onnx 1.23.2.
# Behaviour: a LoRA beside a convolution is two convolutions, and an adapter of rank 0 is none: `Conv` with weights (out, 0, 1, 1) is
#            a sum over nothing, 0. onnxruntime's CPU provider multiplies what lies in the memory of the result by 0 in place
#            of writing 0, so that NaN and Inf of a value that was freed before become NaN. MatMul of (m, 0) and (0, n) is 0. Most memory
#            holds finite numbers, so that most runs are right.
# Seen:      onnxruntime 1.31.1: Conv of 0 channels: not finite in 20 of 20 runs; MatMul: in 0 of 20
# Fails if Conv gives finite numbers, or MatMul does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime==1.31.1 onnx==1.23.2
cat > "$folder/look.py" <<'PY'
import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper


def session(op, first, second, out):
    nodes = [
        helper.make_node("Add", ["big", "big"], ["freed"]),  # of the size of the result, and freed before it is made
        helper.make_node("ReduceMax", ["freed"], ["most"], keepdims=0),
        helper.make_node("Sub", ["most", "most"], ["nothing"]),
        helper.make_node("Add", ["first", "nothing"], ["after"]),  # of no elements, so that its values do not matter
        helper.make_node(op, ["after", "second"], ["y"]),
    ]
    shapes = {"big": ["elements"], "first": first, "second": second, "y": out}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "g", [values["big"], values["first"], values["second"]], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


big = numpy.full(4 * 32 * 32, numpy.inf, numpy.float32)
cases = {
    "Conv": ((1, 0, 32, 32), (4, 0, 1, 1), (["n", "c", "h", "w"], ["o", "c", "kh", "kw"], ["n", "o", "h", "w"])),
    "MatMul": ((64, 0), (0, 64), (["m", "k"], ["k", "n"], ["m", "n"])),
}
wrong = {}
for op, (first, second, shapes) in cases.items():
    given = {"big": big, "first": numpy.zeros(first, "f4"), "second": numpy.zeros(second, "f4")}
    results = [session(op, *shapes).run(None, given)[0] for _ in range(20)]
    assert all(result.size == big.size for result in results)
    wrong[op] = sum(not numpy.isfinite(result).all() for result in results)
print(
    f"onnxruntime {onnxruntime.__version__}: Conv of 0 channels: not finite in {wrong['Conv']} of 20 runs; "
    f"MatMul: in {wrong['MatMul']} of 20"
)
assert wrong["Conv"] > 0
assert wrong["MatMul"] == 0
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
