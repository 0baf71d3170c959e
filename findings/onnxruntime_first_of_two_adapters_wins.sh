#!/usr/bin/env bash
# onnxruntime runs the first of two active adapters and leaves the second out, and an adapter is taken before a value that was fed.
#
# Versions:  onnxruntime 1.32.0 (CPU; 1.31.1 too), onnx 1.23.2, numpy 2.4.6.
# Behaviour: `RunOptions.add_active_adapter` may be called several times, and a LoRA's parameters are inputs with defaults. Of two adapters
#            that name the same inputs the first added one fills them; the second is dropped, without an error or a warning, and
#            nothing is added. It is decided input by input: where the first has A alone, B is the second's. A value that the
#            call itself feeds loses to an active adapter, too. So two LoRAs of one export need to be made one before.
# Seen:      onnxruntime 1.32.0: first, second: 0 from the first, 4.2 from the sum; second, first: 0 from the second
#            A of the first, then all of the second: 0 from the product of both; factors fed beside an adapter: 0 from the adapter
# Fails if one of these differences is another. (The second of the first line depends on the seed.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import sys

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

folder = sys.argv[1]
onnxruntime.set_default_logger_severity(3)
shapes = {"x": ["rows", 4], "A": [4, "rank"], "B": ["rank", 3], "y": ["rows", 3]}
x, a, b, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
none = [numpy_helper.from_array(numpy.zeros(shape, "f4"), name) for name, shape in {"A": (4, 0), "B": (0, 3)}.items()]
nodes = [helper.make_node("MatMul", ["x", "A"], ["narrow"]), helper.make_node("MatMul", ["narrow", "B"], ["y"])]
model = helper.make_model(
    helper.make_graph(nodes, "lora", [x, a, b], [y], none),
    opset_imports=[helper.make_opsetid("", 20)],
    ir_version=10,
)
onnx.checker.check_model(model, full_check=True)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
numbers = numpy.random.default_rng(0)
rows = numbers.standard_normal((2, 4), "f4")
one, two = ({"A": numbers.standard_normal((4, 2), "f4"), "B": numbers.standard_normal((2, 3), "f4")} for _ in range(2))


def adapter(name, factors):
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in factors.items()}
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(f"{folder}/{name}.onnx_adapter")
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(f"{folder}/{name}.onnx_adapter")
    return loaded


def run(*active, **fed):
    options = onnxruntime.RunOptions()
    for each in active:
        options.add_active_adapter(each)
    return session.run(["y"], {"x": rows, **fed}, options)[0]


def apart(got, wanted):
    return abs(got - wanted).max()


first, second, half = adapter("one", one), adapter("two", two), adapter("half", {"A": one["A"]})
of_one, of_two, mixed = rows @ one["A"] @ one["B"], rows @ two["A"] @ two["B"], rows @ one["A"] @ two["B"]
assert apart(run(), 0) == 0
assert apart(run(first), of_one) < 1e-5
assert apart(run(second), of_two) < 1e-5
both, turned, parted, beside = run(first, second), run(second, first), run(half, second), run(first, **two)
print(
    f"onnxruntime {onnxruntime.__version__}: first, second: {apart(both, of_one):.2g} from the first, "
    f"{apart(both, of_one + of_two):.2g} from the sum; second, first: {apart(turned, of_two):.2g} from the second\n"
    f"A of the first, then all of the second: {apart(parted, mixed):.2g} from the product of both; "
    f"factors fed beside an adapter: {apart(beside, of_one):.2g} from the adapter"
)
assert apart(both, of_one) < 1e-5
assert apart(turned, of_two) < 1e-5
assert apart(both, of_one + of_two) > 0.1
assert apart(parted, mixed) < 1e-5
assert apart(beside, of_one) < 1e-5
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
