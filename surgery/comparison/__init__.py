# SPDX-License-Identifier: Apache-2.0
"""Comparison of adapters and of checkpoints."""
