# SPDX-License-Identifier: Apache-2.0
"""Studies of what averaging buys: `python -m studies.NAME` from the repository's root.

A package, so that no installed package called `studies` takes precedence.
"""
