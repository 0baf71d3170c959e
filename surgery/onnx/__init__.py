# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of checkpoints: built from configuration and tensor headers, their weights left where they lie."""
