# SPDX-License-Identifier: Apache-2.0
"""Lessons, one idea each: `python -m examples.NAME` from the repository's root.

A package, and not only a folder: another package's `examples` would win otherwise.
"""
