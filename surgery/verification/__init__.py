# SPDX-License-Identifier: Apache-2.0
"""The checks of `surgery.verify`: bytes against the manifest, graphs against the reference."""
