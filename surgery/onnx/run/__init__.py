# SPDX-License-Identifier: Apache-2.0
"""A small runner for exported graphs: it keeps a graph's contract, and its buffers are made once and stay where they are."""
