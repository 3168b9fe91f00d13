# SPDX-License-Identifier: Apache-2.0
"""Averaged stochastic gradient descent, and the averages of iterates, for optax."""

from asgd_optax._accessor import averaged_params as averaged_params
from asgd_optax._asgd import ASGDState as ASGDState
from asgd_optax._asgd import asgd as asgd
from asgd_optax._averaging import CompensatedMean as CompensatedMean

__version__ = "0.1.0"
