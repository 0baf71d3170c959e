# SPDX-License-Identifier: Apache-2.0
"""GGUF, the model files of llama.cpp: key-values, and tensors in GGML's types, in one file or in splits."""
