# SPDX-License-Identifier: Apache-2.0
"""Binding: which update of an adapter meets which parameter of a base."""
