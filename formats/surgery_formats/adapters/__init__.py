# SPDX-License-Identifier: Apache-2.0
"""Adapter formats: one room per on-disk format, found by content through `registry`."""
