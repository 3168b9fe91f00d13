# SPDX-License-Identifier: Apache-2.0
"""Averaged stochastic gradient descent, and the averages of iterates, for optax."""

from asgd_optax._asgd import ASGDState as ASGDState
from asgd_optax._asgd import asgd as asgd
from asgd_optax._average_iterates import AverageIteratesState as AverageIteratesState
from asgd_optax._average_iterates import average_iterates as average_iterates
from asgd_optax._averaged_params import averaged_params as averaged_params
from asgd_optax._averaging import CompensatedMean as CompensatedMean
from asgd_optax._combine_averages import combine_averages as combine_averages
from asgd_optax._nt_asgd import NTASGDState as NTASGDState
from asgd_optax._nt_asgd import nt_asgd as nt_asgd
from asgd_optax._posthoc_coefficients import AverageProfile as AverageProfile
from asgd_optax._posthoc_coefficients import PosthocFit as PosthocFit
from asgd_optax._posthoc_coefficients import (
    posthoc_coefficients as posthoc_coefficients,
)
from asgd_optax._random_scaling import ConfidenceInterval as ConfidenceInterval
from asgd_optax._random_scaling import RandomScalingState as RandomScalingState
from asgd_optax._running_average import RunningAverage as RunningAverage
from asgd_optax._running_average import RunningAverageState as RunningAverageState
from asgd_optax._running_average import running_average as running_average
from asgd_optax._running_random_scaling import (
    RunningRandomScaling as RunningRandomScaling,
)
from asgd_optax._running_random_scaling import (
    running_random_scaling as running_random_scaling,
)
from asgd_optax._track_random_scaling import confidence_interval as confidence_interval
from asgd_optax._track_random_scaling import (
    track_random_scaling as track_random_scaling,
)
from asgd_optax._weightings import exponential_weighting as exponential_weighting
from asgd_optax._weightings import gamma_of_width as gamma_of_width
from asgd_optax._weightings import polynomial_weighting as polynomial_weighting
from asgd_optax._weightings import power_weighting as power_weighting
from asgd_optax._weightings import uniform_weighting as uniform_weighting

__version__ = "0.1.0"
