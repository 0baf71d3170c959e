# SPDX-License-Identifier: Apache-2.0
"""Tensors: what has a name, a type, a shape and values that can be read; and views of the matrices they hold."""
