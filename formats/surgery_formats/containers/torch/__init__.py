# SPDX-License-Identifier: Apache-2.0
"""Files written by torch.save, read by an interpreter of our own that can only describe tensors."""
