# SPDX-License-Identifier: Apache-2.0
"""Examples of one idea each: `python -m examples.NAME` in the root of the repository.

This is a package, so that Python does not import another package called `examples`.
"""
