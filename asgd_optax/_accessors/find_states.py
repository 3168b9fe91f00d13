# SPDX-License-Identifier: Apache-2.0
"""Finding states of a kind, wherever they stand in a pytree."""

from collections.abc import Collection
from typing import Any

import jax


def find_states(tree: Any, kinds: Collection[type]) -> list[tuple[Any, Any]]:
    """The path and the node of every state in `tree` of one of these very types."""

    def is_state(node: Any) -> bool:
        return type(node) in kinds

    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state)
    return [(path, node) for path, node in found if is_state(node)]
