# SPDX-License-Identifier: Apache-2.0
"""Names of free axes, as other programs look them up.

transformers.js 4 makes the first, empty cache from the shapes of the past inputs: it knows ``batch_size``, and takes 0 for
every other name. optimum 0.1 computes shapes of outputs from the names of input axes, and evaluates sums of them.
"""

from __future__ import annotations

__all__ = ["BATCH", "CHOICES", "KEPT", "PAST", "SEQUENCE", "TOTAL"]

BATCH = "batch_size"
CHOICES = "num_choices"
KEPT = "logits_length"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
