# SPDX-License-Identifier: Apache-2.0
"""Files: bounded reading of inputs, and outputs that appear complete or not at all."""
