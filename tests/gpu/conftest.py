# SPDX-License-Identifier: Apache-2.0
"""Where there is no GPU compiler, there is nothing to collect here: `make test-gpu`."""

from benchmarks import compilers

collect_ignore_glob = [] if compilers.installed("gpu") else ["*.py"]
