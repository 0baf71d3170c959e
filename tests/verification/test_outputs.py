# SPDX-License-Identifier: Apache-2.0
"""With filled slots, too, every output and every branch of a graph is compared, and none may be missing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import surgery
from surgery.onnx.graph.pair_names import MERGED
from surgery_formats.errors import ProofError
from tests.oracles import recipes
from tests.support import trained


def exported(name, modules, task, folder, **options):
    base = recipes.build(name, folder / "base")
    kind, settings = trained._lora(target_modules=modules)
    adapter = trained.train(name, base, (kind, settings), folder / "adapter", task=task)
    surgery.export_onnx(base, swap=[adapter], output=folder / "out", target="portable", **options)
    (folder / "out" / "surgery_manifest.json").unlink()
    surgery.verify(folder / "out")
    return folder / "out"


def scale(body, slot):
    """Multiply the input `slot` by 1.5 where the nodes of `body` read it."""
    place, node = next((place, node) for place, node in enumerate(body.node) if slot in node.input)
    body.initializer.append(onnx.numpy_helper.from_array(np.array(1.5, np.float32), "factor"))
    node.input[:] = ["scaled" if name == slot else name for name in node.input]
    body.node.insert(place, onnx.helper.make_node("Mul", [slot, "factor"], ["scaled"]))


@pytest.mark.parametrize(
    ("name", "module", "output"),
    [("bert_sentence", "pooler.dense", "pooled output"), ("clip_text_projected", "text_projection", "text embeds")],
)
def test_a_slot_behind_the_hidden_states_is_verified(tmp_path, name, module, output):
    out = exported(name, [module], "FEATURE_EXTRACTION", tmp_path)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    scale(model.graph, f"{module}.lora_B.weight")
    (out / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ProofError, match=f"{output} of 3 rows, slots filled"):
        surgery.verify(out)


@pytest.mark.parametrize(("branch", "said"), [(False, "first run"), (True, "later runs")])
def test_slots_of_the_last_layer_are_verified_in_both_branches(tmp_path, branch, said):
    out = exported("t5", ["wo"], "SEQ_2_SEQ_LM", tmp_path)
    model = onnx.load(out / MERGED, load_external_data=False)
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    name = "then_branch" if branch else "else_branch"
    (body,) = (attribute.g for attribute in choice.attribute if attribute.name == name)
    scale(body, "decoder.block.1.layer.2.DenseReluDense.wo.lora_B.weight")
    (out / MERGED).write_bytes(model.SerializeToString())
    with pytest.raises(ProofError, match=f"{said} of 3 rows, slots filled"):
        surgery.verify(out)


def test_an_output_that_the_model_has_and_the_graph_has_not_is_missed(tmp_path):
    base = recipes.build("bert_sentence", tmp_path / "base")
    surgery.export_onnx(base, output=tmp_path / "out")
    (tmp_path / "out" / "surgery_manifest.json").unlink(missing_ok=True)
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.graph.output[1]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ProofError, match="lacks the output 'pooler_output'"):
        surgery.verify(tmp_path / "out")
