# SPDX-License-Identifier: Apache-2.0
"""What models and adapters are: in memory, on disk, and their arithmetic."""
