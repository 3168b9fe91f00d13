# SPDX-License-Identifier: Apache-2.0
"""Record states of torch's optimizers in tests/fixtures/torch_states.json.

Run `python -m tools.record_torch_state_fixtures` with torch 2.13 on the CPU. Every run
writes the same bytes. The tests import this module; the functions that need torch
import it themselves.
"""

import contextlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tools.record_torch_fixtures import check_torch, draw_problem

FIXTURES = pathlib.Path(__file__).parents[1] / "tests/fixtures/torch_states.json"

# A torch model: a convolution, two blocks of the same shape, and a bias.
SHAPES = {
    "conv.weight": (2, 1, 2, 3),
    "blocks.0.weight": (2, 3),
    "blocks.1.weight": (2, 3),
    "bias": (2,),
}

# Steps after which the run moves from torch to JAX, moves back, and ends.
OUT, BACK, END = 15, 30, 40


class Case(NamedTuple):
    """A run of a torch optimizer.

    Attributes:
      arguments: arguments of the optimizer.
      dtype: dtype of the parameters.
      last_group: arguments of a separate group for the last parameter, if any.
      begins: number of steps before a parameter gets its first gradient, by name.
      gamma: factor of an `ExponentialLR`, if any.
      optimizer: name of the optimizer.
    """

    arguments: dict[str, Any]
    dtype: str = "float64"
    last_group: dict[str, Any] | None = None
    begins: Mapping[str, int] = MappingProxyType({})
    gamma: float | None = None
    optimizer: str = "ASGD"


_ARGUMENTS = {"lr": 0.1, "lambd": 0.02, "alpha": 0.6, "t0": 5, "weight_decay": 0.1}

CASES = {
    "float64": Case(_ARGUMENTS),
    "float32": Case(_ARGUMENTS, dtype="float32"),
    "complex128": Case(_ARGUMENTS, dtype="complex128"),
    "complex64": Case(_ARGUMENTS, dtype="complex64"),
    "bfloat16": Case(_ARGUMENTS, dtype="bfloat16"),
    "before t0": Case(_ARGUMENTS | {"t0": 20}),
    "maximize": Case(_ARGUMENTS | {"maximize": True, "foreach": True}),
    "scheduler": Case(_ARGUMENTS, gamma=0.9),
    "groups": Case(_ARGUMENTS, last_group={"lr": 0.05, "weight_decay": 0.0}),
    "never a gradient": Case(_ARGUMENTS, begins={"conv.weight": END}),
    "a late gradient": Case(_ARGUMENTS, begins={"bias": 3}),
    "Adam": Case({"lr": 0.1}, optimizer="Adam"),
}

# The fixtures are valid only for these values.
RECIPE = repr((SHAPES, OUT, BACK, END, CASES))


class Snapshot(NamedTuple):
    """Weights by name and the optimizer's state dict after some steps."""

    weights: dict[str, Any]
    state_dict: dict[str, Any]


def draw_run(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw initial weights, and gradients whose leading axis is the step."""
    dtype = "float32" if case.dtype == "bfloat16" else case.dtype
    weights, gradients = draw_problem(dtype, END, SHAPES)
    if case.dtype == "bfloat16":
        weights, gradients = (
            {name: x.astype(ml_dtypes.bfloat16) for name, x in tree.items()}
            for tree in (weights, gradients)
        )
    return weights, gradients


def train_torch(
    case: Case,
    weights: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    first: int = 0,
    last: int,
    state_dict: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Run torch from step `first` to step `last`, then save and load its state.

    Returns:
      Weights as NumPy arrays (with ml_dtypes' bfloat16) and a state dict of tensors.
    """
    import torch

    parameters = {name: tensor_of(weights[name]) for name in SHAPES}
    *most, final = parameters.values()
    groups = [{"params": [*most, final]}]
    if case.last_group is not None:
        groups = [{"params": most}, {"params": [final]} | case.last_group]
    with default_dtype_for(case.dtype):
        optimizer = getattr(torch.optim, case.optimizer)(groups, **case.arguments)
        scheduler = None
        if case.gamma is not None:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, case.gamma)
            scheduler.last_epoch = first
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
        for step in range(first, last):
            for name, parameter in parameters.items():
                if step >= case.begins.get(name, 0):
                    parameter.grad = tensor_of(gradients[name][step])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return Snapshot(
        {name: array_of(parameter) for name, parameter in parameters.items()},
        torch.load(file, weights_only=True),
    )


def tensor_of(array: np.ndarray) -> Any:
    """Copy a NumPy array to a tensor."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def array_of(tensor: Any) -> np.ndarray:
    """Copy a tensor to a NumPy array."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


@contextlib.contextmanager
def default_dtype_for(dtype: str) -> Iterator[None]:
    """Set torch's default dtype to float64 if `dtype` has double precision.

    ASGD keeps eta, mu and step in float32 unless the default dtype is float64.
    """
    import torch

    double = dtype in ("float64", "complex128")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_fixtures() -> tuple[str, dict[str, tuple[Snapshot, Snapshot]]]:
    """Return the recipe and, by case, the snapshots after `OUT` and `BACK` steps.

    The state dicts are torch's, with NumPy arrays instead of tensors.
    """
    cases = json.loads(FIXTURES.read_text())
    recipe = cases.pop("recipe")
    return recipe, {name: tuple(map(_unpacked, pair)) for name, pair in cases.items()}


def _packed(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as JSON values; decimal numbers restore every bit."""

    def numbers(array: np.ndarray) -> dict[str, Any]:
        parts = (
            np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array
        )
        return {
            "dtype": str(array.dtype),
            "shape": array.shape,
            "values": parts.ravel().tolist(),
        }

    return {
        "weights": {name: numbers(x) for name, x in snapshot.weights.items()},
        "state": {
            id_: {key: numbers(array_of(tensor)) for key, tensor in entry.items()}
            for id_, entry in snapshot.state_dict["state"].items()
        },
        "param_groups": snapshot.state_dict["param_groups"],
    }


def _unpacked(packed: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot that `_packed` was given, with arrays for tensors."""

    def array(numbers: Mapping[str, Any]) -> np.ndarray:
        dtype = np.dtype(numbers["dtype"])
        part = np.finfo(dtype).dtype if dtype.kind == "c" else dtype
        values = np.array(numbers["values"]).astype(part)
        return values.view(dtype).reshape(numbers["shape"])

    return Snapshot(
        {name: array(numbers) for name, numbers in packed["weights"].items()},
        {
            "state": {
                int(id_): {key: array(numbers) for key, numbers in entry.items()}
                for id_, entry in packed["state"].items()
            },
            "param_groups": packed["param_groups"],
        },
    )


def main() -> None:
    """Record every case after `OUT` and after `BACK` steps, one line per case."""
    check_torch()
    lines = {"recipe": json.dumps(RECIPE)}
    for name, case in CASES.items():
        weights, gradients = draw_run(case)
        snapshots = [
            train_torch(case, weights, gradients, last=last) for last in (OUT, BACK)
        ]
        lines[name] = json.dumps([_packed(snapshot) for snapshot in snapshots])
    content = ",\n".join(f"{json.dumps(name)}: {line}" for name, line in lines.items())
    FIXTURES.parent.mkdir(exist_ok=True)
    FIXTURES.write_text(f"{{\n{content}\n}}\n")


if __name__ == "__main__":
    main()
