# SPDX-License-Identifier: Apache-2.0
"""Collect nothing here without Playwright: `make test-docs` installs it."""

import importlib.util

collect_ignore_glob = ["*.py"] if importlib.util.find_spec("playwright") is None else []
