#!/usr/bin/env bash
# Olive's ExtractAdapters, with its default options, writes a graph in which every slot is twice among the inputs.
#
# Versions:  olive-ai 0.13.0, onnx 1.23.2, onnx-ir 1.1.0.
# Behaviour: the pass makes an input of each factor (`_convert_initializer_to_input` appends it to the graph's inputs), and for
#            `optional_inputs`, which is the default, `_make_dynamic_optional` appends the same value again. ONNX wants each name
#            once: onnx.checker refuses the file. onnxruntime loads it and runs it, so that nothing is noticed until a program
#            that checks (or numbers) a graph's inputs opens it. With `optional_inputs` off there is one of each.
# Seen:      optional_inputs=True: 2 slots, 4 inputs
#            the checker: Graph must be in single static assignment (SSA) form
#            optional_inputs=False: 2 slots, 2 inputs
# Fails if a slot is listed once with the default options, or the checker passes it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" olive-ai==0.13.0 onnx==1.23.2 onnx-ir==1.1.0 \
    onnxruntime==1.32.0 torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.extract_adapters import ExtractAdapters

folder = sys.argv[1]
shapes = {"q.weight": (8, 8), "q.lora_A.MatMul.weight": (8, 2), "q.lora_B.MatMul.weight": (2, 8)}
nodes = [
    helper.make_node("MatMul", ["x", "q.weight"], ["wx"], name="/model/layers.0/attn/q_proj/MatMul"),
    helper.make_node("MatMul", ["x", "q.lora_A.MatMul.weight"], ["ax"], name="/model/layers.0/attn/q_proj/lora_A/MatMul"),
    helper.make_node("MatMul", ["ax", "q.lora_B.MatMul.weight"], ["bax"], name="/model/layers.0/attn/q_proj/lora_B/MatMul"),
    helper.make_node("Add", ["wx", "bax"], ["y"], name="/model/layers.0/attn/q_proj/Add"),
]
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in ("x", "y")]
weights = [numpy_helper.from_array(numpy.ones(shape, numpy.float32), name) for name, shape in shapes.items()]
graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
source = f"{folder}/source.onnx"
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), source)
onnx.checker.check_model(source, full_check=True)

for optional in (True, False):
    settings = {} if optional else {"optional_inputs": False}
    handler = ONNXModelHandler(source)
    made = create_pass_from_dict(ExtractAdapters, settings, disable_search=True).run(handler, f"{folder}/{optional}")
    model = onnx.load(made.model_path, load_external_data=False)
    names = [one.name for one in model.graph.input if "lora" in one.name]
    print(f"optional_inputs={optional}: {len(set(names))} slots, {len(names)} inputs")
    assert len(set(names)) == 2
    assert len(names) == (4 if optional else 2)
    if optional:
        try:
            onnx.checker.check_model(onnx.load(made.model_path))
            verdict = "passes"
        except onnx.checker.ValidationError as error:
            verdict = str(error).split(",")[0]
        print(f"the checker: {verdict}")
        assert verdict.startswith("Graph must be in single static assignment (SSA) form")
PY
OLIVE_DISABLE_TELEMETRY=1 PYTHONPATH="$folder/site" python3 "$folder/look.py" "$folder"
