# SPDX-License-Identifier: Apache-2.0
"""Recipes: chains of verbs as data, read from YAML or from a manifest."""
