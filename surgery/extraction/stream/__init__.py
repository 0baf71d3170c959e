# SPDX-License-Identifier: Apache-2.0
"""The one pass over both checkpoints: rows are read, subtracted, measured and factorised while they are in memory."""
