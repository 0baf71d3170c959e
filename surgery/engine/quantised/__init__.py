# SPDX-License-Identifier: Apache-2.0
"""Weights stored as codes: which codes they get in an output, what a LoRA beside them holds, and what files say of them."""
