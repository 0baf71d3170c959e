# SPDX-License-Identifier: Apache-2.0
"""Graph: an ONNX graph built from a recipe, and the contract it carries."""
