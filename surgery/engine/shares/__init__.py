# SPDX-License-Identifier: Apache-2.0
"""Work in shares: workers with a common file system, or a bucket, do parts of it, in any order, independently."""
