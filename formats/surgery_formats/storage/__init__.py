# SPDX-License-Identifier: Apache-2.0
"""Storages: how a logical weight lies in stored tensors. One file per storage."""
