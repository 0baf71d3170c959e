# SPDX-License-Identifier: Apache-2.0
"""The command ``surgery``: each sub-command parses, calls one function of the library and renders what it returns."""
