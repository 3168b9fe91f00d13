# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: find and compare subtrees by their metadata, read and save."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from asgd_optax._core import trees
from asgd_optax._core.checks import is_key

# Orbax's file with the metadata of a tree's leaves.
_METADATA = "_METADATA"

# The keys from the root of a tree to one of its nodes, as strings.
Keys = tuple[str, ...]


class Part(NamedTuple):
    """A subtree of a checkpoint, of which only the metadata has been read."""

    name: str  # the checkpoint's path and the subtree's keys, for messages
    folder: epath.Path  # with the item that has the subtree
    tree: Any  # the metadata of the item's leaves, in dicts and lists
    keys: Keys  # of the subtree in `tree`
    subtree: Any


def find_part(path: Any, part: str | Sequence[Any] | None) -> Part:
    """Read a checkpoint's metadata; raise if it is not complete or has no such part."""
    keys = part.split("/") if isinstance(part, str) else part or ()
    # Orbax needs an absolute path; one with a scheme, such as gs://, is absolute.
    name = os.fspath(path)
    root = epath.Path(name if "://" in name else os.path.abspath(name))
    if not root.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {root}")
    if not ocp.utils.is_checkpoint_finalized(root):
        raise ValueError(
            f"{root} is unfinished: the save was interrupted or is still running"
        )
    folder, keys = _find_item(root, tuple(map(str, keys)))
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except Exception as error:
        raise ValueError(f"cannot read the metadata of {root}: {error}") from error
    name, subtree = str(root), tree
    for key in keys:
        if isinstance(subtree, list | tuple):
            subtree = dict(enumerate(subtree))
        children = subtree if isinstance(subtree, Mapping) else {}
        children = {str(name): child for name, child in children.items()}
        if key not in children:
            available = ", ".join(map(repr, children)) or "none"
            raise ValueError(f"no key {key!r} in {name}; available: {available}")
        name, subtree = f"{name}[{key!r}]", children[key]
    return Part(name, folder, tree, keys, subtree)


def check_agree(parts: Sequence[Part], like: Any = None) -> Any:
    """Compare parts, and `like`, with the first; return what to restore them as."""
    targets = {p.name: jax.tree.map(_default_target, p.subtree) for p in parts}
    if like is not None:
        targets["like"] = like
    (first_name, first), *others = [(n, _saved_as(t)) for n, t in targets.items()]
    for name, other in others:
        trees.check_agree(name, other, first_name, first)
    return [*targets.values()][-1]


def read(part: Part, targets: Mapping[Keys, Any]) -> dict[Keys, Any]:
    """Read leaves of a part, as JAX arrays if their targets have a sharding."""
    targets = {part.keys + keys: target for keys, target in targets.items()}
    flat = ocp.tree.to_flat_dict(part.tree)
    item = {keys: 0 if keys in targets else ocp.PLACEHOLDER for keys in flat}
    restore_args = {keys: _restore_args(targets.get(keys)) for keys in flat}
    arguments = ocp.args.PyTreeRestore(
        item=ocp.tree.from_flat_dict(item, target=part.tree),
        restore_args=ocp.tree.from_flat_dict(restore_args, target=part.tree),
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(part.folder, args=arguments)
    except Exception as error:
        raise ValueError(f"cannot read {part.name}: {error}") from error
    leaves = ocp.tree.to_flat_dict(restored)
    for keys, target in targets.items():
        if is_key(target) and not is_key(leaves[keys]):
            path = "/".join(keys)
            raise ValueError(f"like has a PRNG key at {path}, but {part.name} has not")
    return {keys[len(part.keys) :]: leaves[keys] for keys in targets}


def convert(leaf: Any, target: Any, typed_keys: bool) -> Any:
    """Convert a leaf that was read to the kind of array that its target is."""
    sharding = getattr(target, "sharding", None)
    if is_key(leaf):
        if typed_keys or is_key(target):
            return leaf
        leaf = jax.device_put(jax.random.key_data(leaf), sharding)
    if isinstance(target, str) or sharding is not None:
        return leaf
    return np.asarray(leaf)[()] if np.isscalar(target) else np.asarray(leaf)


def write(folder: Path, tree: Any) -> None:
    """Save a tree in a folder that does not exist yet."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    except Exception as error:
        raise ValueError(f"Orbax cannot save the average: {error}") from error


def find_steps(run: Path) -> dict[int, Path]:
    """Return the folders of a run's finished steps by number, in ascending order."""
    if (run / _METADATA).exists():
        raise ValueError(f"{run} is a single checkpoint, not a folder of steps")
    steps: dict[int, Path] = {}
    for path in ocp.utils.checkpoint_steps_paths(run.absolute()):
        # The name is a number, or ends in an underscore and a number.
        step = int(path.name.rpartition("_")[2])
        if step in steps:
            raise ValueError(f"{steps[step]} and {path} are the same step")
        steps[step] = Path(path)
    return dict(sorted(steps.items()))


def _find_item(root: epath.Path, keys: Keys) -> tuple[epath.Path, Keys]:
    """Return an item's folder and the keys in its tree; the first may be its name."""
    if (root / _METADATA).exists():
        return root, keys
    items = sorted(x.name for x in root.iterdir() if (x / _METADATA).exists())
    if keys and keys[0] in items:
        return root / keys[0], keys[1:]
    if not items:
        raise ValueError(f"{root} is not an Orbax checkpoint: no {_METADATA} file")
    if len(items) > 1:
        names = ", ".join(map(repr, items))
        raise ValueError(f"{root} has several items; part must begin with {names}")
    return root / items[0], keys


def _default_target(leaf: Any) -> Any:
    """Return what to restore a leaf as without `like`, from its metadata."""
    if isinstance(leaf, ocp.metadata.StringMetadata):
        return ""
    if type(leaf) is ocp.metadata.ScalarMetadata:
        return np.dtype(leaf.dtype).type()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _saved_as(tree: Any) -> Any:
    """Return the shapes and dtypes in which Orbax saves a tree, in nested dicts."""

    def saved_as(leaf: Any) -> Any:
        if isinstance(leaf, str):
            return leaf
        if is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        dtype = np.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype
        if getattr(leaf, "sharding", None) is not None:
            # Orbax would silently restore 64 bits as 32 unless jax_enable_x64 is set.
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype)

    flat = ocp.tree.to_flat_dict(tree)
    return ocp.tree.from_flat_dict({keys: saved_as(x) for keys, x in flat.items()})


def _restore_args(target: Any) -> ocp.RestoreArgs:
    sharding = getattr(target, "sharding", None)
    dtype = getattr(target, "dtype", None)
    if sharding is None and (is_key(target) or dtype == np.uint32):
        # Orbax restores typed PRNG keys, whose data are uint32, only as JAX arrays.
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if sharding is not None:
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    return ocp.RestoreArgs(restore_type=str if isinstance(target, str) else np.ndarray)
