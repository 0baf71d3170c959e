# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of updates: pure functions on arrays, each with an error bound."""
