# SPDX-License-Identifier: Apache-2.0
"""Helpers of the benchmarks and studies, and recorders of test fixtures.

A package, so that no installed package called `tools` takes precedence.
"""
