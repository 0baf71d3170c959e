# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a graph: its weights under the names of the base that it was made of."""
