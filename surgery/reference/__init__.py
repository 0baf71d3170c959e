# SPDX-License-Identifier: Apache-2.0
"""The logits that a model should give, computed from config.json and weights alone, slowly and plainly.

It shares the recipe with the graph exporter but not one line of arithmetic: a fault in rotary frequencies, masks, norms
or layouts would have to be made twice, in two ways, to go unnoticed. Weights are read layer by layer; the model is
never whole in memory.
"""

from surgery.reference.generate import Greedy, greedy
from surgery.reference.model import (
    Cache,
    Encoded,
    Output,
    encode,
    forward,
    prompt_cache,
)
from surgery.reference.reference import Reference, open_reference
from surgery.reference.weights import ReferenceWeights, planned_weights, stored_weights

__all__ = [
    "Cache",
    "Encoded",
    "Greedy",
    "Output",
    "Reference",
    "ReferenceWeights",
    "encode",
    "forward",
    "greedy",
    "open_reference",
    "planned_weights",
    "prompt_cache",
    "stored_weights",
]
