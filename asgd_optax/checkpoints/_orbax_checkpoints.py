# SPDX-License-Identifier: Apache-2.0
"""Parts of Orbax checkpoints: found and compared by metadata, then read alone."""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from asgd_optax._core.checks import is_key

# The file that tells of the leaves, beside them.
_METADATA = "_METADATA"
# What Orbax calls an item that was given no name.
_UNNAMED = "default"


# From the root of a tree to a leaf of it.
Keys = tuple[str, ...]


class Kind(NamedTuple):
    """What a leaf must have in common with that of another checkpoint."""

    shape: tuple[int, ...]
    dtype: Any


class Part(NamedTuple):
    """A part of what lies in a folder, of which metadata alone has been read.

    Attributes:
      path: the checkpoint's, for messages.
      folder: of the item: the checkpoint's own, or one in it.
      keys: of the part in the item's tree.
      tree: the metadata of the item's leaves in dicts and lists.
    """

    path: Any
    folder: Any
    keys: Keys
    tree: Any

    def subtree(self) -> Any:
        return _at(self.tree, self.keys)

    def kinds(self) -> dict[Keys, Kind]:
        """The leaves by their keys below the part's."""
        leaves = ocp.tree.to_flat_dict(self.subtree())
        return {keys: _kind_on_disk(leaf) for keys, leaf in leaves.items()}


def keys_of(part: str | Sequence[Any] | None) -> Keys:
    """The keys that `part` names."""
    if part is None:
        return ()
    keys = part.split("/") if isinstance(part, str) else part
    if not isinstance(keys, list | tuple):
        raise TypeError(f"part must be a string or a tuple of keys; got {part!r}")
    return tuple(map(str, keys))


def find_part(path: str | os.PathLike[str], keys: Keys) -> Part:
    """Reads a checkpoint's metadata.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: no checkpoint, an unfinished one, one whose metadata cannot be read,
        or one without this part. Names the path.
    """
    # Orbax wants absolute ones; those with a scheme, as of a bucket, are.
    where = os.fspath(path)
    return _find(epath.Path(where if "://" in where else os.path.abspath(where)), keys)


def _find(path: Any, keys: Keys) -> Part:
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not path.is_dir():
        raise ValueError(f"{path} is no checkpoint, but a file")
    if not ocp.utils.is_checkpoint_finalized(path):
        raise ValueError(f"{path} is unfinished: its save was cut off or goes on")
    folder, keys = _item(path, keys)
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except Exception as error:
        raise ValueError(f"{path}: its metadata cannot be read: {error}") from error
    part = Part(path, folder, keys, tree)
    for n, key in enumerate(keys):
        node = _at(tree, keys[:n])
        names = _names(node)
        if key not in names:
            where = "/".join(keys[:n]) or "its tree"
            there = ", ".join(map(repr, names)) or "nothing below it"
            raise ValueError(f"{path} has no {key!r} in {where}: there is {there}")
    return part


def check_alike(part: Part, first: Part) -> None:
    """Raises unless two parts have the same leaves; names path and leaf."""
    _check_fits(f"{part.path}", part.kinds(), first)


def check_target(like: Any, part: Part) -> dict[Keys, Any]:
    """The leaves of `like`; raises unless they are those on the disk, naming one."""
    leaves = ocp.tree.to_flat_dict(like)
    for keys, leaf in leaves.items():
        # What Orbax would cast without a word.
        if (
            not is_key(leaf)
            and getattr(leaf, "sharding", None) is not None
            and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
        ):
            name = repr("/".join(part.keys + keys))
            raise ValueError(
                f"like: {name} is {leaf.dtype}, of which JAX makes no arrays unless"
                " jax_enable_x64 is set"
            )
    kinds = {keys: _kind_in_memory(leaf) for keys, leaf in leaves.items()}
    _check_fits("like", kinds, part)
    return leaves


def read(
    part: Part, leaves: Collection[Keys], targets: Mapping[Keys, Any] | None = None
) -> dict[Keys, Any]:
    """Reads leaves of a part, and no others.

    Args:
      part: as `find_part` found it.
      leaves: their keys below the part's.
      targets: what to restore them onto, checked already; without it they are NumPy's,
        but for keys of random numbers.

    Raises:
      ValueError: it cannot be read; names the path.
    """
    on_disk = ocp.tree.to_flat_dict(part.subtree())
    arguments = {
        part.keys + keys: _on_host(on_disk[keys])
        if targets is None
        else _onto(targets[keys])
        for keys in leaves
    }
    restore = ocp.args.PyTreeRestore(
        item=_map(part.tree, lambda keys: 0 if keys in arguments else ocp.PLACEHOLDER),
        restore_args=_map(
            part.tree, lambda keys: arguments.get(keys, ocp.RestoreArgs())
        ),
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(part.folder, args=restore)
    except Exception as error:
        raise ValueError(f"{part.path} cannot be read: {error}") from error
    values = ocp.tree.to_flat_dict(_at(restored, part.keys))
    if targets is None:
        return {keys: _to_host(values[keys], on_disk[keys]) for keys in leaves}
    for keys in leaves:
        if is_key(targets[keys]) and not is_key(values[keys]):
            leaf = repr("/".join(part.keys + keys))
            raise ValueError(
                f"like: {leaf} is a key of random numbers, that of {part.path} is none"
            )
    return {keys: _placed(values[keys], targets[keys]) for keys in leaves}


def groups_of(part: Part, least: int, most: int) -> list[dict[Keys, int]]:
    """The leaves and their bytes, in at most so many groups.

    A group is of `least` bytes at least, but for the last.
    """
    sizes = {
        keys: math.prod(kind.shape) * kind.dtype.itemsize
        for keys, kind in part.kinds().items()
    }
    least = max(least, -(-sum(sizes.values()) // most))
    groups: list[dict[Keys, int]] = []
    for keys, size in sizes.items():
        if not groups or sum(groups[-1].values()) >= least:
            groups.append({})
        groups[-1][keys] = size
    return groups


def unflatten(leaves: Mapping[Keys, Any], part: Part, like: Any = None) -> Any:
    """The tree with these leaves: of the structure of `like`, or as it was saved."""
    target = part.subtree() if like is None else like
    return ocp.tree.from_flat_dict(leaves, target=target) if leaves else target


def write(folder: Path, tree: Any) -> None:
    """Saves a tree in a folder that is not there yet.

    Raises:
      ValueError: Orbax does not save it: an empty tree, say, or a full disk.
    """
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    except Exception as error:
        raise ValueError(f"Orbax cannot save it: {error}") from error


def steps_of(run: str | os.PathLike[str]) -> dict[int, Path]:
    """The finished steps in a run's folder, ascending, by whatever names Orbax reads.

    Raises:
      ValueError: a folder that is a checkpoint itself, or two of one step.
    """
    if Path(run, _METADATA).exists():
        raise ValueError(f"{run} is one checkpoint, not a folder of steps")
    steps: dict[int, Path] = {}
    for path in ocp.utils.checkpoint_steps_paths(os.path.abspath(run)):
        # A number, or what ends in an underscore and one.
        step = int(path.name.rpartition("_")[2])
        if step in steps:
            raise ValueError(f"{steps[step]} and {path} are the same step")
        steps[step] = Path(path)
    return dict(sorted(steps.items()))


def _item(path: Any, keys: Keys) -> tuple[Any, Keys]:
    """The folder with the tree that the first key may name, and the keys in it."""
    if (path / _METADATA).exists():
        return path, keys
    items = sorted(x.name for x in path.iterdir() if (x / _METADATA).exists())
    if keys and keys[0] in items and keys[0] != _UNNAMED:
        return path / keys[0], keys[1:]
    if not items:
        raise ValueError(
            f"{path} is no checkpoint: it has no {_METADATA} file of Orbax"
        )
    if len(items) > 1:
        raise ValueError(
            f"{path} has several items, {', '.join(map(repr, items))}: the first key of"
            f" part must be one of them; got {'/'.join(keys) or None!r}"
        )
    return path / items[0], keys


def _names(node: Any) -> list[str]:
    if isinstance(node, Mapping):
        return sorted(map(str, node))
    return [str(n) for n in range(len(node))] if isinstance(node, list | tuple) else []


def _at(tree: Any, keys: Keys) -> Any:
    for key in keys:
        if isinstance(tree, Mapping):
            tree = next(value for name, value in tree.items() if str(name) == key)
        else:
            tree = tree[int(key)]
    return tree


def _map(tree: Any, f: Callable[[Keys], Any]) -> Any:
    """`f` of the keys of every leaf, in their places."""
    keys = ocp.tree.to_flat_dict(tree)
    return ocp.tree.from_flat_dict({k: f(k) for k in keys}, target=tree)


def _kind_on_disk(leaf: Any) -> Kind:
    if isinstance(leaf, ocp.metadata.StringMetadata):
        return Kind((), np.dtype(str))
    return Kind(tuple(leaf.shape), np.dtype(leaf.dtype))


def _kind_in_memory(leaf: Any) -> Kind:
    if is_key(leaf):
        # On the disk lie the integers of a key.
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif isinstance(leaf, str):
        return Kind((), np.dtype(str))
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return Kind(tuple(leaf.shape), np.dtype(leaf.dtype))


def _check_fits(name: str, kinds: Mapping[Keys, Kind], part: Part) -> None:
    """Raises unless what is called `name` has the leaves of `part`."""
    others = part.kinds()
    for keys in [*others, *kinds]:
        leaf = repr("/".join(part.keys + keys))
        if keys not in kinds:
            raise ValueError(f"{name} has no leaf {leaf}, which {part.path} has")
        if keys not in others:
            raise ValueError(f"{name} has a leaf {leaf}, which {part.path} has not")
        for what, here, there in zip(
            Kind._fields, kinds[keys], others[keys], strict=True
        ):
            if here != there:
                raise ValueError(
                    f"{name}: {leaf} has {what} {here}, that of {part.path} {there}"
                )


def _on_host(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, ocp.metadata.StringMetadata):
        return ocp.RestoreArgs(restore_type=str)
    if leaf.dtype == np.uint32:
        # It may be a key of random numbers, which is told when it is restored as one.
        return _onto_one_device()
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _to_host(value: Any, leaf: Any) -> Any:
    if isinstance(leaf, ocp.metadata.StringMetadata) or is_key(value):
        return value
    value = np.asarray(value)
    return value[()] if type(leaf) is ocp.metadata.ScalarMetadata else value


def _onto(target: Any) -> ocp.RestoreArgs:
    if isinstance(target, str):
        return ocp.RestoreArgs(restore_type=str)
    sharding = getattr(target, "sharding", None)
    if sharding is None and is_key(target):
        return _onto_one_device()
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # Shape and dtype are compared already; that of a key is not what lies there.
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _onto_one_device() -> ocp.RestoreArgs:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _placed(value: Any, target: Any) -> Any:
    """A value that was read, as the kind of array that its target is."""
    if isinstance(target, str) or is_key(target):
        return value
    sharding = getattr(target, "sharding", None)
    if is_key(value):
        value = jax.device_put(jax.random.key_data(value), sharding)
    if sharding is not None:
        return value
    return np.asarray(value)[()] if np.isscalar(target) else np.asarray(value)
