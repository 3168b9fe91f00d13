# SPDX-License-Identifier: Apache-2.0
"""Averaged Flax models, and BatchNorm statistics for them.

`asgd_optax` does not import this module, so it does not need Flax.
"""

from asgd_optax.flax._averaged_model import averaged_model as averaged_model
from asgd_optax.flax._update_batch_stats import update_batch_stats as update_batch_stats
