# SPDX-License-Identifier: Apache-2.0
"""What `surgery.combine` and `surgery.resize` are made of: sums of adapters, exact, cut to a rank, or as task vectors."""
