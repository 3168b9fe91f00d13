# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m benchmarks.NAME` from the repository's root.

A package, so that no installed package called `benchmarks` takes precedence.
"""
