# SPDX-License-Identifier: Apache-2.0
"""Conversion of optimizer states from and to `torch.optim.ASGD`.

With constant hyperparameters, a run continues after a move as it would have without
it, in either direction. With a scheduler, torch applies each learning rate one step
late. If the scheduler sets the learning rate `schedule(n)` after n steps, ::

    asgd(**hyperparams | {"learning_rate": lambda n: schedule(jnp.maximum(n - 1, 0))})

continues as torch would have; going back, pass `learning_rate=schedule(n)` to
`state_to_torch`.

`asgd_optax` does not import this package, and only `state_to_torch` imports PyTorch.
"""

from asgd_optax.torch._from_torch import (
    hyperparams_from_torch as hyperparams_from_torch,
    state_from_torch as state_from_torch,
)
from asgd_optax.torch._to_torch import state_to_torch as state_to_torch
