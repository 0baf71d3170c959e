# SPDX-License-Identifier: Apache-2.0
"""Output: files and folders that appear complete or not at all."""
