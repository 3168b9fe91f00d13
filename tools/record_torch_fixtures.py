# SPDX-License-Identifier: Apache-2.0
"""Record trajectories of `torch.optim.ASGD` in tests/fixtures/torch_asgd.npz.

Run `python -m tools.record_torch_fixtures` with torch 2.13 on the CPU. Every run writes
the same bytes. Only `run_torch` needs torch; the tests import the rest of this module,
and `run_torch` if torch is installed.
"""

import contextlib
import itertools
import pathlib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "torch_asgd.npz"

DTYPES = ("float32", "float64", "complex64", "complex128")
SHAPES = {"empty": (0, 3), "matrix": (2, 2), "scalar": (), "vector": (3,)}


class Case(NamedTuple):
    """Arguments of torch's ASGD, and the name and arguments of an LR scheduler."""

    arguments: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]] | None = None


# The cases of torch's own tests on the CPU, with their descriptions:
# `optim_inputs_func_asgd` in torch/testing/_internal/common_optimizers.py.
TORCH_CASES = {
    "default": Case({}),
    "non-default lambd": Case({"lambd": 0.1}),
    "non-default lr": Case({"lr": 0.02}),
    "t0": Case({"t0": 100}),
    "maximize": Case({"maximize": True}),
    "nonzero weight_decay": Case({"weight_decay": 0.1}),
    "maximize, nonzero weight_decay": Case({"weight_decay": 0.1, "maximize": True}),
}
CASES = TORCH_CASES | {
    "t0 = 0": Case({"t0": 0}),
    "t0 = 2": Case({"t0": 2}),
    "t0 between two steps": Case({"t0": 2.5}),
    "alpha": Case({"lambd": 0.1, "alpha": 0.5, "t0": 10}),
    "no lambd": Case({"lambd": 0.0, "t0": 10}),
    "all": Case(
        {
            "lr": 0.05,
            "lambd": 0.02,
            "alpha": 0.6,
            "t0": 20,
            "weight_decay": 0.1,
            "maximize": True,
        }
    ),
    "StepLR": Case(
        {"lr": 0.1, "lambd": 0.1, "t0": 5}, ("StepLR", {"step_size": 10, "gamma": 0.5})
    ),
    "ExponentialLR": Case(
        {"lr": 0.1, "lambd": 0.1, "t0": 5}, ("ExponentialLR", {"gamma": 0.95})
    ),
}
RUNS = list(itertools.product(CASES, (False, True)))  # by case and `foreach`

# Numbers of updates: around the starts at t0 = 0, 2 and 100, and at the end.
CHECKPOINTS = (1, 2, 4, 5, 102, 103, 120)

# A float32 run long enough for visible rounding errors, with enough parameters to know
# their rms to 1.6 %.
LONG_CASE = Case({"t0": 10})
LONG_STEPS = 2000
LONG_SHAPES = {"vector": (2048,)}

# Fixtures that were recorded with another recipe are invalid.
RECIPE = repr((CASES, CHECKPOINTS, SHAPES, LONG_CASE, LONG_STEPS, LONG_SHAPES))


def draw_problem(
    dtype: str, steps: int, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw initial parameters, and gradients whose leading axis is the step.

    The numbers are the same on any machine: the stream of `RandomState` is frozen, and
    its uniform draws are exact arithmetic, while normal ones call the C library.
    """
    random = np.random.RandomState(0)

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        draw = np.asarray(random.uniform(-1, 1, shape))
        if np.issubdtype(dtype, np.complexfloating):
            draw = draw + 1j * random.uniform(-1, 1, shape)
        return draw.astype(dtype)

    # Away from zero, so that relative differences are meaningful.
    params = {name: 2 + uniform(shape) for name, shape in shapes.items()}
    gradients = {name: uniform((steps, *shape)) for name, shape in shapes.items()}
    return params, gradients


def run_torch(
    case: Case,
    params: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    *,
    foreach: bool,
    checkpoints: Collection[int],
) -> dict[str, np.ndarray]:
    """Run torch's ASGD and return its parameters and states after `checkpoints`.

    Returns:
      Arrays whose leading axis is the checkpoint: "params/..." and "ax/..." of each
      parameter, and "eta", "mu" and "step".
    """
    import torch

    weights = {name: torch.from_numpy(np.array(p)) for name, p in params.items()}
    rows: dict[str, list[np.ndarray]] = {}
    with default_dtype_as(next(iter(weights.values()))):
        optimizer = torch.optim.ASGD(
            weights.values(), **case.arguments, foreach=foreach
        )
        scheduler = None
        if case.scheduler is not None:
            name, arguments = case.scheduler
            scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
        for step in range(1, max(checkpoints) + 1):
            for name, weight in weights.items():
                weight.grad = torch.from_numpy(np.array(gradients[name][step - 1]))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if step not in checkpoints:
                continue
            for name, weight in weights.items():
                state = optimizer.state[weight]
                rows.setdefault(f"params/{name}", []).append(weight.numpy().copy())
                rows.setdefault(f"ax/{name}", []).append(state["ax"].numpy().copy())
            # Every parameter has its own copies of these, which are equal.
            for name in ("eta", "mu", "step"):
                rows.setdefault(name, []).append(state[name].numpy().copy())
    return {name: np.stack(row) for name, row in rows.items()}


@contextlib.contextmanager
def default_dtype_as(weight: Any) -> Iterator[None]:
    """Set torch's default dtype to float64 if `weight` has double precision.

    Otherwise ASGD keeps eta, mu and step in float32 even for float64 parameters, whose
    trajectory is then accurate only to float32.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.real.dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_torch() -> None:
    """End the program unless torch has the recorded version."""
    import torch

    if not torch.__version__.startswith("2.13."):
        raise SystemExit(f"expected torch 2.13, got {torch.__version__}")


def main() -> None:
    """Record every case in every dtype, and the final errors of the long runs."""
    check_torch()
    arrays = {"recipe": np.array(RECIPE)}
    for dtype in DTYPES:
        params, gradients = draw_problem(dtype, max(CHECKPOINTS))
        runs = [
            run_torch(
                CASES[name],
                params,
                gradients,
                foreach=foreach,
                checkpoints=CHECKPOINTS,
            )
            for name, foreach in RUNS
        ]
        for name in runs[0]:
            arrays[f"{dtype}/{name}"] = np.stack([run[name] for run in runs])

    params, gradients = draw_problem("float32", LONG_STEPS, LONG_SHAPES)

    def long_average(dtype: str, foreach: bool) -> np.ndarray:
        run = run_torch(
            LONG_CASE,
            {name: p.astype(dtype) for name, p in params.items()},
            {name: g.astype(dtype) for name, g in gradients.items()},
            foreach=foreach,
            checkpoints=(LONG_STEPS,),
        )
        return run["ax/vector"][-1]

    exact = long_average("float64", foreach=False)
    arrays["long/ax"] = exact
    for name, foreach in (("for-loop", False), ("foreach", True)):
        error = long_average("float32", foreach) - exact
        arrays[f"long/rms/{name}"] = np.sqrt(np.mean(error**2))
    FIXTURES.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURES, **arrays)


if __name__ == "__main__":
    main()
