# SPDX-License-Identifier: Apache-2.0
"""Verbs: one module for each command of ``surgery``, with a function of the same name."""
