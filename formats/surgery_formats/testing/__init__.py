# SPDX-License-Identifier: Apache-2.0
"""For authors of plugins: conformance suites, and a way to register a plugin for the length of a test."""
