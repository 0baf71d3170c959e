# SPDX-License-Identifier: Apache-2.0
"""The plan of a merge with its files, and what people read of it: summary, card, next step."""
