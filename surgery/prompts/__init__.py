# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: shown, read by the tokens near them and by what they do, baked, combined, converted and transferred."""
