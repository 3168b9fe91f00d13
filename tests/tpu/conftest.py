# SPDX-License-Identifier: Apache-2.0
"""Collect nothing here without the TPU compiler: `make test-tpu` installs it."""

import importlib.util

collect_ignore_glob = ["*.py"] if importlib.util.find_spec("libtpu") is None else []
