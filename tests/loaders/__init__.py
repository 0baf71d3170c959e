# SPDX-License-Identifier: Apache-2.0
"""What the programs that load adapters make of them: small adapters, loaders that run each program's own code, and what they did."""
