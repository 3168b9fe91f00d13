# SPDX-License-Identifier: Apache-2.0
"""Studies and timings: `python -m benchmarks.NAME` from the repository's root.

A package, and not only a folder: another package's `benchmarks` would win otherwise.
"""
