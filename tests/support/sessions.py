# SPDX-License-Identifier: Apache-2.0
"""Runs graphs the plainest way there is: one call of onnxruntime per step, caches passed on as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from surgery.onnx.graph.contract import Contract, from_metadata

__all__ = ["Plain", "feed_encoder", "open_session"]


def open_session(path: Path) -> tuple[onnxruntime.InferenceSession, Contract]:
    """The session and the contract of its graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    contract = from_metadata(session.get_modelmeta().custom_metadata_map)
    assert contract is not None
    return session, contract


class Plain:
    """A decoder, its cache growing with every call."""

    def __init__(self, path: Path, batch: int = 1) -> None:
        self.session, self.contract = open_session(path)
        self.past: dict[str, np.ndarray[Any, Any]] = {
            one.name: np.zeros((batch, self.contract.kv_heads, 0, self.contract.head_dim), np.float32)
            for one in self.session.get_inputs()
            if one.name.startswith("past_key_values.")
        }
        state = np.zeros((batch, *self.contract.state), np.float32)
        self.past |= {f"past_conv.{layer}": state for layer in self.contract.convolutions}

    def step(self, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits of new tokens `ids` (B, S); `mask` covers past and new tokens."""
        feed = {"input_ids": ids, "attention_mask": mask, **self.past}
        names = [one.name for one in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, feed), strict=True))
        present = {
            name: name.replace("past_key_values.", "present.").replace("past_", "present_") for name in self.past
        }
        self.past = {name: found[output] for name, output in present.items()}
        return np.asarray(found["logits"])


def feed_encoder(session: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Outputs of an encoder by name."""
    feed = {"input_ids": ids, "attention_mask": mask}
    if any(one.name == "token_type_ids" for one in session.get_inputs()):
        feed["token_type_ids"] = np.arange(ids.size).reshape(ids.shape) % 2
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))
