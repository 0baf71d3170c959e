# SPDX-License-Identifier: Apache-2.0
"""What `surgery.verify` is made of: bytes by the manifest, graphs by the reference."""
