# SPDX-License-Identifier: Apache-2.0
"""The grammar of adapters in one file of weights: how sites are spelt, what stands behind them, and where scales are.

A key is ``PREFIX MODULE . LEAF``. `spelling` has the prefixes and the module, `leaves` the leaves, `scales` the scales,
`kinds` what the leaves of a module make, `tools` the programs that write such files. `reader` and `writer` put them
together for the formats, each of which is a `dialect.Dialect` in a package of its own.
"""
