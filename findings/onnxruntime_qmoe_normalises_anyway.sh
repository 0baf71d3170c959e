#!/usr/bin/env bash
# onnxruntime's experts in codes normalise the router's weights although they are told not to; its experts in numbers do as told.
#
# Versions:  onnxruntime 1.32.0 (CPU; 1.23.2 and 1.31.1 too), onnx 1.23.2, numpy 2.4.6.
# Behaviour: com.microsoft.MoE and QMoE take a router's logits, choose the k largest, and weigh the experts with the softmax of all
#            logits or, with `normalize_routing_weights`, with that of the chosen. MoE does so. QMoE without its input
#            `router_weights` does the latter whatever the attribute says, so that a mixture whose chosen weights do not add up to 1
#            (Qwen2-MoE, OLMoE: `norm_topk_prob` false) gets too much of its experts. No error is raised.
# Seen:      1.32.0, MoE told 0: 0.2 from the softmax of the chosen, 2e-07 from that of all; told 1: 2e-07, 0.3
#            1.32.0, QMoE told 0: 2e-07 from the softmax of the chosen, 0.3 from that of all; told 1: 2e-07, 0.3
# Fails if QMoE told 0 is near the softmax of all, or another is not what it is told. (The large ones depend on the seed.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import numpy
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WIDTH, EXPERTS, TOP, BLOCK = 64, 4, 2, 32
numbers = numpy.random.default_rng(0)
tokens, router = numbers.standard_normal((3, WIDTH), "f4"), numbers.standard_normal((3, EXPERTS), "f4")


def weights(rows):
    codes = numbers.integers(0, 16, (EXPERTS, rows, WIDTH), "u1")
    scales = numbers.uniform(0.01, 0.02, (EXPERTS, rows, WIDTH // BLOCK)).astype("f4")
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales, (codes - 8.0) * numpy.repeat(scales, BLOCK, axis=2)


(codes1, scales1, inputs), (codes2, scales2, outputs) = weights(2 * WIDTH), weights(WIDTH)
stored = {
    "MoE": {"w1": inputs.astype("f4"), "w2": outputs.astype("f4")},
    "QMoE": {"codes1": codes1, "scales1": scales1, "codes2": codes2, "scales2": scales2},
}
named = {
    "MoE": ["x", "router", "w1", "", "w2"],
    "QMoE": ["x", "router", "codes1", "scales1", "", "codes2", "scales2"],
}


def run(op, told):
    options = {"expert_weight_bits": 4, "block_size": BLOCK} if op == "QMoE" else {}
    options |= {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
    options |= {"k": TOP, "normalize_routing_weights": told}
    node = helper.make_node(op, named[op], ["y"], domain="com.microsoft", **options)
    shapes = {"x": tokens.shape, "router": router.shape, "y": tokens.shape}
    x, choice, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    kept = [numpy_helper.from_array(array, name) for name, array in stored[op].items()]
    model = helper.make_model(
        helper.make_graph([node], "g", [x, choice], [y], kept),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": tokens, "router": router})[0]


def expected(normalised):
    result = numpy.zeros(tokens.shape)
    for row, logits, into in zip(tokens, router, result, strict=True):
        chosen = numpy.argsort(-logits)[:TOP]
        whole = numpy.exp(logits[chosen] if normalised else logits).sum()
        for expert in chosen:
            product = inputs[expert] @ row
            gate, up = product[0::2], product[1::2]
            into += numpy.exp(logits[expert]) / whole * (outputs[expert] @ (gate / (1 + numpy.exp(-gate)) * up))
    return result


def apart(got, wanted):
    return numpy.linalg.norm(got - wanted) / numpy.linalg.norm(wanted)


for op in ("MoE", "QMoE"):
    (first, second), (third, fourth) = (
        (apart(run(op, told), expected(True)), apart(run(op, told), expected(False))) for told in (0, 1)
    )
    print(
        f"{onnxruntime.__version__}, {op} told 0: {first:.1g} from the softmax of the chosen, {second:.1g} from that of all; "
        f"told 1: {third:.1g}, {fourth:.1g}"
    )
    assert third < 1e-5 and fourth > 0.05
    assert (first < 1e-5) == (second > 0.05) == (op == "QMoE")
    assert (second < 1e-5) == (first > 0.05) == (op == "MoE")
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
