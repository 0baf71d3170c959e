# SPDX-License-Identifier: Apache-2.0
"""Object storage as a place of inputs and outputs; its library is imported with the first reference to it."""
