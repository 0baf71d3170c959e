# SPDX-License-Identifier: Apache-2.0
"""What `surgery.extract` is made of: two checkpoints read side by side, their differences factorised, chosen, written and proved."""
