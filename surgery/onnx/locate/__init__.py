# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint in a graph, found by their values, whoever made it."""
