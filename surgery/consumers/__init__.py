# SPDX-License-Identifier: Apache-2.0
"""Programs that load adapters: what each makes of a file, as rules with their sources, and rewritings that it honours."""
