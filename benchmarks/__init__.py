# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the cost of averaging: `python -m benchmarks.NAME` in a checkout.

This is a package, so that no installed package called `benchmarks` takes precedence.
"""
