#!/usr/bin/env bash
# onnxruntime loads an Attention that is given earlier keys and asked for its result alone, and cannot run it.
#
# Versions:  onnxruntime 1.32.0 (CPU; 1.31.1 too), onnx 1.23.2, numpy 2.4.6.
# Behaviour: of the standard's operator Attention (opset 23 and 24), `past_key` and `past_value` are optional inputs and `present_key` and
#            `present_value` optional outputs. A decoder that needs no later step, or whose layer reads another layer's keys, asks for
#            the result alone. onnx.checker passes the file, onnx's reference computes it and onnxruntime opens a session, whose
#            first run raises Fail. With both outputs named, whether or not anything reads them, it gives the reference's result.
# Seen:      1.32.0, opset 23: asked for the result alone: Fail; with both outputs named: 1e-07 from onnx's reference
#            1.32.0, opset 24: asked for the result alone: Fail; with both outputs named: 1e-07 from onnx's reference
# Fails if the first runs or raises another error, or the second does not agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

onnxruntime.set_default_logger_severity(4)
numbers = numpy.random.default_rng(0)
shapes = dict.fromkeys(["q", "k", "v"], (1, 2, 3, 8)) | dict.fromkeys(["past_key", "past_value"], (1, 2, 4, 8))
given = {name: numbers.standard_normal(shape, "f4") for name, shape in shapes.items()}
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
result = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["q"])


def model(opset, *more):
    node = helper.make_node("Attention", ["q", "k", "v", "", "past_key", "past_value"], ["y", *more])
    graph = helper.make_graph([node], "g", inputs, [result])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    onnx.checker.check_model(made, full_check=True)
    return made


def session(made):
    return onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])


for opset in (23, 24):
    alone, named = model(opset), model(opset, "present_key", "present_value")
    wanted = ReferenceEvaluator(alone).run(["y"], given)[0]
    opened, raised = session(alone), "nothing"
    try:
        opened.run(["y"], given)
    except Exception as error:
        raised = type(error).__name__
    difference = abs(session(named).run(["y"], given)[0] - wanted).max()
    print(
        f"{onnxruntime.__version__}, opset {opset}: asked for the result alone: {raised}; with both outputs named: "
        f"{difference:.0e} from onnx's reference"
    )
    assert raised == "Fail"
    assert difference < 1e-5
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
