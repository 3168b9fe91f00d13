# SPDX-License-Identifier: Apache-2.0
"""Settings that must be made before jax is imported, and the option `--no-skips`."""

import os

# The sharding tests need eight devices; XLA splits one CPU into them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    """Add `--no-skips`, with which a skipped test fails the run."""
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails")


def pytest_sessionfinish(session):
    """Fail the run if a test was skipped and `--no-skips` is given."""
    if session.config.getoption("--no-skips"):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        # The workers of pytest-xdist have no reporter.
        if reporter and reporter.stats.get("skipped"):
            session.exitstatus = 1
