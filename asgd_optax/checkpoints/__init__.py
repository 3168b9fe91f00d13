# SPDX-License-Identifier: Apache-2.0
"""Averaging of checkpoints saved by Orbax (checkpoint merging).

`python -m asgd_optax.checkpoints` does the same from the command line. `asgd_optax`
does not import this package, so it works without Orbax.
"""

from asgd_optax.checkpoints._average_checkpoints import (
    average_checkpoints as average_checkpoints,
)
from asgd_optax.checkpoints._decay_coefficients import (
    decay_coefficients as decay_coefficients,
)
