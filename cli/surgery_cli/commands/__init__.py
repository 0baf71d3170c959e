# SPDX-License-Identifier: Apache-2.0
"""One file per sub-command, imported when it is the one asked for; each defines `command`."""
