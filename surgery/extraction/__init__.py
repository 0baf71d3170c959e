# SPDX-License-Identifier: Apache-2.0
"""The parts of `surgery.extract`.

Two checkpoints are read side by side; their differences are factorised, chosen, written and proved.
"""
