# SPDX-License-Identifier: Apache-2.0
"""Exports: the adapters in a graph, and the graphs and weights on disk."""
