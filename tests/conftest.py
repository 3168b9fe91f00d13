# SPDX-License-Identifier: Apache-2.0
"""Settings that have to be made before jax is imported."""

import os

# Sharding is tested on eight devices of one CPU.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    """`--no-skips`, for runs that are to show something of every test."""
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails")


def pytest_sessionfinish(session):
    """A run with skipped tests has failed, where it is told so."""
    if session.config.getoption("--no-skips"):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        # The workers of pytest-xdist have none.
        if reporter and reporter.stats.get("skipped"):
            session.exitstatus = 1
