# SPDX-License-Identifier: Apache-2.0
"""Oracles: tiny models, adapters and faults whose right answer is known without using the product.

Nothing here imports ``surgery``. Adapters are trained-looking (every tensor random and non-zero) and written by PEFT itself;
the answers come from PEFT's merge of a *float64* copy of the model, or, where PEFT is wrong, from the attached model or a formula.
"""
