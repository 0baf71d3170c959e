# SPDX-License-Identifier: Apache-2.0
"""Export: where adapters go in a graph, and where graphs and weights go on disk."""
