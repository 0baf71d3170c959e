# SPDX-License-Identifier: Apache-2.0
"""Containers: the kinds of file and folder that hold a model's tensors. One file or package per container."""
