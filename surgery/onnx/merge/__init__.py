# SPDX-License-Identifier: Apache-2.0
"""Merges into a graph: new bytes of the tensors that hold located weights."""
