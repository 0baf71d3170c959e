# SPDX-License-Identifier: Apache-2.0
"""Slots, gated adapters and modules, put into a graph that exists."""
