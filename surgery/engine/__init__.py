# SPDX-License-Identifier: Apache-2.0
"""Engine: plans, the executor that runs them, the ledger, and the proofs."""
