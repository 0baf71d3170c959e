# SPDX-License-Identifier: Apache-2.0
"""Run: sessions, caches, sampling and adapters of exported graphs."""
