# SPDX-License-Identifier: Apache-2.0
"""Changes of graphs that exist, whoever made them."""
