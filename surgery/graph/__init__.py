# SPDX-License-Identifier: Apache-2.0
"""The module graph of a checkpoint: what its parts are, from its family or from its names alone."""

from surgery.graph.modules import Node, Totals, leaves, module_graph, role_totals, stored_ties

__all__ = ["Node", "Totals", "leaves", "module_graph", "role_totals", "stored_ties"]
