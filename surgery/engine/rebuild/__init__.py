# SPDX-License-Identifier: Apache-2.0
"""The plan of a checkpoint that is made of another's tensors, and its result."""
