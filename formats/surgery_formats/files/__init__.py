# SPDX-License-Identifier: Apache-2.0
"""Bytes on disk: safetensors, sharded folders, torch pickles, and folders that appear complete or not at all."""
