# SPDX-License-Identifier: Apache-2.0
"""Taking a merge back: the inverse of every update, and the file of what rounding lost."""
