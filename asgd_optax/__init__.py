# SPDX-License-Identifier: Apache-2.0
"""Weight averaging for JAX: EMA, Polyak and SWA averages with any optax optimizer."""

from asgd_optax._accessors.averaged_params import averaged_params as averaged_params
from asgd_optax._accessors.confidence_interval import (
    ConfidenceInterval as ConfidenceInterval,
    confidence_interval as confidence_interval,
)
from asgd_optax._accessors.replace_average import replace_average as replace_average
from asgd_optax._core.averaging import CompensatedMean as CompensatedMean
from asgd_optax._core.weightings import (
    decay_from_half_life as decay_from_half_life,
    exponential_weighting as exponential_weighting,
    gamma_from_width as gamma_from_width,
    polynomial_weighting as polynomial_weighting,
    power_weighting as power_weighting,
    uniform_weighting as uniform_weighting,
)
from asgd_optax._loops import (
    EndOnAverageState as EndOnAverageState,
    WithOwnParamsState as WithOwnParamsState,
    end_on_average as end_on_average,
    with_own_params as with_own_params,
)
from asgd_optax._posthoc.combine_averages import combine_averages as combine_averages
from asgd_optax._posthoc.posthoc_coefficients import (
    AverageProfile as AverageProfile,
    PosthocFit as PosthocFit,
    posthoc_coefficients as posthoc_coefficients,
)
from asgd_optax._statistics.running_average import (
    RunningAverageState as RunningAverageState,
    running_average as running_average,
)
from asgd_optax._statistics.running_random_scaling import (
    RandomScalingState as RandomScalingState,
    running_random_scaling as running_random_scaling,
)
from asgd_optax._statistics.statistic import Statistic as Statistic
from asgd_optax._transforms.asgd import ASGDState as ASGDState, asgd as asgd
from asgd_optax._transforms.average_iterates import (
    AverageIteratesState as AverageIteratesState,
    average_iterates as average_iterates,
)
from asgd_optax._transforms.nt_asgd import (
    NTASGDState as NTASGDState,
    nt_asgd as nt_asgd,
)
from asgd_optax._transforms.track_iterates import (
    TrackIteratesState as TrackIteratesState,
    track_iterates as track_iterates,
)

__version__ = "0.2.0"
