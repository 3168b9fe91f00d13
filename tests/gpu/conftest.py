# SPDX-License-Identifier: Apache-2.0
"""Collect nothing here without the GPU compiler: `make test-gpu` installs it."""

from benchmarks import compilers

collect_ignore_glob = [] if compilers.installed("gpu") else ["*.py"]
