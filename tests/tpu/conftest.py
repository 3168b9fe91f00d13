# SPDX-License-Identifier: Apache-2.0
"""Where there is no TPU compiler, there is nothing to collect here: `make test-tpu`."""

import importlib.util

collect_ignore_glob = ["*.py"] if importlib.util.find_spec("libtpu") is None else []
