# SPDX-License-Identifier: Apache-2.0
"""Reports: what results say to people and machines."""
