# SPDX-License-Identifier: Apache-2.0
"""An adapter and two bases: how far they lie apart beside its update, which one it was trained on, and its values."""
