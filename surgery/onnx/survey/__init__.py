# SPDX-License-Identifier: Apache-2.0
"""What a graph in a file is: operators, inputs, weights and their modules, and what runs it. Nothing is loaded to tell."""
