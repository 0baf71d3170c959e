# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text, and how much two models agree on it."""
