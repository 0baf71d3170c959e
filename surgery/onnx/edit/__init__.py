# SPDX-License-Identifier: Apache-2.0
"""Reading the nodes of a graph that exists, changing them, and writing it anew."""
