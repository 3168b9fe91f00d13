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
