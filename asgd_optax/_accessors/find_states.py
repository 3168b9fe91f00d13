# SPDX-License-Identifier: Apache-2.0
"""Search for states in a pytree."""

from collections.abc import Collection
from typing import Any

import jax


def find_states(tree: Any, kinds: Collection[type]) -> list[tuple[Any, Any]]:
    """Return the path and the node of every state in `tree` of exactly these types."""

    def is_state(node: Any) -> bool:
        return type(node) in kinds

    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state)
    return [(path, node) for path, node in found if is_state(node)]
