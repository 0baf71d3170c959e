# SPDX-License-Identifier: Apache-2.0
"""Graphs: an ONNX graph built from a recipe, with the contract it carries."""
