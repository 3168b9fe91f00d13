# SPDX-License-Identifier: Apache-2.0
"""Averaged stochastic gradient descent, and the averages of iterates, for optax."""

from asgd_optax._accessors.averaged_params import averaged_params as averaged_params
from asgd_optax._core.averaging import CompensatedMean as CompensatedMean
from asgd_optax._core.weightings import (
    exponential_weighting as exponential_weighting,
    gamma_from_width as gamma_from_width,
    polynomial_weighting as polynomial_weighting,
    power_weighting as power_weighting,
    uniform_weighting as uniform_weighting,
)
from asgd_optax._posthoc.combine_averages import combine_averages as combine_averages
from asgd_optax._posthoc.posthoc_coefficients import (
    AverageProfile as AverageProfile,
    PosthocFit as PosthocFit,
    posthoc_coefficients as posthoc_coefficients,
)
from asgd_optax._statistics.random_scaling import (
    ConfidenceInterval as ConfidenceInterval,
    RandomScalingState as RandomScalingState,
)
from asgd_optax._statistics.running_average import (
    RunningAverage as RunningAverage,
    RunningAverageState as RunningAverageState,
    running_average as running_average,
)
from asgd_optax._statistics.running_random_scaling import (
    RunningRandomScaling as RunningRandomScaling,
    running_random_scaling as running_random_scaling,
)
from asgd_optax._transforms.asgd import ASGDState as ASGDState, asgd as asgd
from asgd_optax._transforms.average_iterates import (
    AverageIteratesState as AverageIteratesState,
    average_iterates as average_iterates,
)
from asgd_optax._transforms.nt_asgd import (
    NTASGDState as NTASGDState,
    nt_asgd as nt_asgd,
)
from asgd_optax._transforms.track_random_scaling import (
    confidence_interval as confidence_interval,
    track_random_scaling as track_random_scaling,
)

__version__ = "0.1.0"
