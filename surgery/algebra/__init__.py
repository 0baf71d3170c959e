# SPDX-License-Identifier: Apache-2.0
"""Algebra of adapters: sums, dense merges, resizing, selection, fused and split projections."""
