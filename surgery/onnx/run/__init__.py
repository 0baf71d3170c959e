# SPDX-License-Identifier: Apache-2.0
"""Running exported graphs: sessions, caches, sampling and adapters."""
