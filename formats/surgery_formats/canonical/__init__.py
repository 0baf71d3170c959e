# SPDX-License-Identifier: Apache-2.0
"""The canonical form of an adapter, which every format reads into and writes from."""
