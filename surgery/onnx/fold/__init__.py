# SPDX-License-Identifier: Apache-2.0
"""Branches of LoRAs in a graph, folded into the weights beside them."""
