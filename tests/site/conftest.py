# SPDX-License-Identifier: Apache-2.0
"""Where there is no browser to drive, there is nothing to collect: `make test-docs`."""

import importlib.util

collect_ignore_glob = ["*.py"] if importlib.util.find_spec("playwright") is None else []
