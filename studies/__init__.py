# SPDX-License-Identifier: Apache-2.0
"""Studies of the benefit of averaging: `python -m studies.NAME` in a checkout.

This is a package, so that no installed package called `studies` takes precedence.
"""
