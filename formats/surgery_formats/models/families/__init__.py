# SPDX-License-Identifier: Apache-2.0
"""Model families as data: which names mean what, one small file per family.

Names, the module tree and graph recipes read the same record.
"""
