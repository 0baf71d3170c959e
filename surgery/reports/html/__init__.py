# SPDX-License-Identifier: Apache-2.0
"""HTML: one self-contained file per result, and a fragment for notebooks. It knows sections, and no result."""
