# SPDX-License-Identifier: Apache-2.0
"""Models: checkpoints, the names and ties of their parameters, and what is known of each model family."""
