# SPDX-License-Identifier: Apache-2.0
"""What changes graphs that exist: weights located by value, new bytes in their places, slots beside them."""
