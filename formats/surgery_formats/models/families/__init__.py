# SPDX-License-Identifier: Apache-2.0
"""Model families as data, one small file per family.

Names, the module tree and graph recipes all read the same record.
"""
