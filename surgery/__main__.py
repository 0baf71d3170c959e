# SPDX-License-Identifier: Apache-2.0
"""``python -m surgery``: the command. It is a package above this one, so it is run by its name and not imported."""

import runpy

runpy.run_module("surgery_cli", run_name="__main__", alter_sys=True)
