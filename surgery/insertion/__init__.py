# SPDX-License-Identifier: Apache-2.0
"""What is put into a model, or beside it: fresh adapters, and tensors that a fine-tune changed, as they are."""
