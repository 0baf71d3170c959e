# SPDX-License-Identifier: Apache-2.0
"""Layouts of diffusion networks: one network under the names of several programs, as tables of data."""
