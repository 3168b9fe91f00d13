# SPDX-License-Identifier: Apache-2.0
"""The format of `torch.optim.ASGD.state_dict()`, read without PyTorch."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_HYPERPARAMS = ("lr", "lambd", "alpha", "t0", "weight_decay")

_USE_PARTITION = (
    "give each its own asgd with optax.partition, as in docs/how_to/move_a_torch_job.md"
    " under 'Parameter groups'"
)


def shared_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of all groups and `maximize`, by torch's names."""
    if "param_groups" not in state_dict:
        raise ValueError(
            "state_dict must be what optimizer.state_dict() returned, with the keys"
            f" 'state' and 'param_groups'; got the keys {list(state_dict)}"
        )
    shared: dict[str, Any] = {}
    for i, group in enumerate(state_dict["param_groups"]):
        missing = [key for key in _HYPERPARAMS if key not in group]
        if missing:
            raise ValueError(
                f"state_dict must be of a torch.optim.ASGD, but param_groups[{i}] lacks"
                f" {missing}"
            )
        settings = {key: float(read_array(group[key]).item()) for key in _HYPERPARAMS}
        # Torch has had `maximize` since 1.12.
        settings["maximize"] = group.get("maximize", False)
        shared = shared or settings
        for key, value in settings.items():
            if value != shared[key]:
                raise ValueError(
                    f"parameter groups differ: {key} is {shared[key]} in"
                    f" param_groups[0], but {value} in param_groups[{i}];"
                    f" {_USE_PARTITION}"
                )
    return shared


def ids_by_name(state_dict: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return torch's id of each parameter, in torch's order."""
    names, groups = list(names), state_dict["param_groups"]
    ids = [id_ for group in groups for id_ in group["params"]]
    if not len(names) == len(set(names)) == len(ids):
        raise ValueError(
            f"expected one name per parameter: got {len(names)} names"
            f" ({len(set(names))} different) for {len(ids)} parameters. Pass the names"
            " in model.named_parameters(): no buffers, and tied weights once"
        )
    rest = iter(names)
    for group in groups:
        own = [next(rest) for _ in group["params"]]
        noted = group.get("param_names") or []
        # A group whose "params" were split has the other parameters' names as well.
        pairs = zip(own, noted, strict=True) if len(own) == len(noted) else ()
        for name, noted_name in pairs:
            # Unknown names are fine: a wrapped model, say, adds a prefix.
            if name != noted_name and name in noted:
                raise ValueError(
                    f"names must be in torch's order: got {name!r} where torch has"
                    f" {noted_name!r}"
                )
    return dict(zip(names, ids, strict=True))


def shared_counters(
    entries: Mapping[str, Mapping[str, Any]],
) -> tuple[int, float, float]:
    """Return the step, eta and mu of all parameters, given torch's state of each."""
    steps = {name: int(read_array(entry["step"])) for name, entry in entries.items()}
    first, step = next(iter(steps.items()))
    for name, other in steps.items():
        if other != step:
            raise ValueError(
                f"parameters are at different steps: {first!r} at {step}, {name!r} at"
                f" {other}; {_USE_PARTITION}"
            )
    return step, _most_precise("eta", entries), _most_precise("mu", entries)


def _most_precise(key: str, entries: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the number that all entries hold, from the one of the widest dtype.

    Torch rounds a parameter's numbers to its dtype when it loads a state.
    """
    values = {name: read_array(entry[key]) for name, entry in entries.items()}
    limits = {name: jnp.finfo(value.dtype) for name, value in values.items()}
    best = min(values, key=lambda name: float(limits[name].eps))
    expected = float(values[best])
    for name, value in values.items():
        # Allow for a few roundings, also of subnormal numbers.
        ulp = float(limits[name].eps) * max(expected, float(limits[name].tiny))
        if abs(float(value) - expected) > 4 * ulp:
            raise ValueError(
                f"{key} is {expected} for {best!r}, but {float(value)} for {name!r}:"
                " a group's hyperparameters have changed since the last step. Make one"
                f" more step in torch, or {_USE_PARTITION}"
            )
    return expected


def read_array(value: Any) -> np.ndarray:
    """Copy a tensor, an array or a number to a NumPy array."""
    if not hasattr(value, "detach"):
        return np.array(value)
    # Torch converts no bfloat16 to NumPy; float32 holds every bfloat16.
    if str(value.dtype) == "torch.bfloat16":
        return value.float().numpy(force=True).astype(jnp.bfloat16)
    return np.array(value.numpy(force=True))


def read_average(name: str, value: Any) -> np.ndarray:
    """Copy the average of a parameter; raise if it is not finite."""
    average = read_array(value)
    if not np.isfinite(average).all():
        raise ValueError(f"the average of {name!r} is not finite")
    return average
