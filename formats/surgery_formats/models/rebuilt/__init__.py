# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made of the tensors of others: layers left out or repeated, projections parted or joined, rows cut."""
