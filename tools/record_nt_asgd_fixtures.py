# SPDX-License-Identifier: Apache-2.0
"""Record AWD-LSTM's training loop in torch in tests/fixtures/torch_nt_asgd.npz.

Run `python -m tools.record_nt_asgd_fixtures` with torch 2.13 on the CPU. Every run
writes the same bytes. Only `run_torch` needs torch; the tests import the rest of this
module, and `run_torch` if torch is installed.
"""

from typing import Any, NamedTuple

import numpy as np

from tools import record_torch_fixtures
from tools.record_torch_fixtures import check_torch, default_dtype_as, draw_problem

FIXTURES = record_torch_fixtures.FIXTURES.with_name("torch_nt_asgd.npz")

DTYPES = ("float32", "float64")
SHAPES = {"vector": (3,)}
EPOCHS = 24
UPDATES = 3  # per epoch
SEQUENCES = 40  # of validation losses, per case


class Case(NamedTuple):
    """Options of the training loop, with their names there, and ASGD's lambd."""

    lr: float
    wdecay: float
    nonmono: int
    lambd: float


CASES = {
    "AWD-LSTM's defaults": Case(30.0, 1.2e-6, 5, 0.0),
    "the least nonmono": Case(0.1, 0.1, 1, 0.0),
    "decays": Case(0.5, 0.01, 3, 0.02),
}

# Epochs after which params and averages are recorded; live runs compare all epochs.
CHECKPOINTS = (6, 12, 18, 24)

RECIPE = repr((CASES, CHECKPOINTS, SHAPES, EPOCHS, UPDATES, SEQUENCES))


class Run(NamedTuple):
    """The result of a loop.

    Attributes:
      fired: the number, from 1, of the epoch whose validation loss started averaging;
        0 if none did.
      params: the parameters after each epoch. Shape (EPOCHS, 3).
      average: the parameters that the loop would evaluate, like `params`.
    """

    fired: int
    params: np.ndarray
    average: np.ndarray


def draw_losses() -> np.ndarray:
    """Draw sequences of validation losses. Shape (SEQUENCES, EPOCHS).

    They fall and flatten with more or less noise; some have a jump or only rise. All
    are multiples of 1/64, which gives ties and avoids rounding.
    """
    random = np.random.RandomState(1)
    epochs = np.arange(EPOCHS)
    rows = []
    for n in range(SEQUENCES):
        pace, noise = random.uniform(0.02, 0.5), random.uniform(0, 0.5)
        losses = np.exp2(-pace * epochs) + noise * random.uniform(-1, 1, EPOCHS)
        if n % 8 == 6:
            losses = losses + (epochs == random.randint(EPOCHS)) * 4
        if n % 8 == 7:
            losses = np.sort(losses)
        rows.append(np.round(64 * losses) / 64)
    return np.stack(rows)


def run_torch(
    case: Case, weight: np.ndarray, gradients: np.ndarray, losses: np.ndarray
) -> Run:
    """Run SGD, the switch of the released code, and then a new ASGD."""
    import torch

    w = torch.from_numpy(np.array(weight))
    optimizer: Any = torch.optim.SGD([w], lr=case.lr, weight_decay=case.wdecay)
    earlier: list[float] = []
    fired, params, averages = 0, [], []
    with default_dtype_as(w):
        for epoch in range(EPOCHS):
            for update in range(UPDATES):
                w.grad = torch.from_numpy(np.array(gradients[UPDATES * epoch + update]))
                optimizer.step()
            averaging = "t0" in optimizer.param_groups[0]
            average = optimizer.state[w]["ax"] if averaging else w
            params.append(w.numpy().copy())
            averages.append(average.numpy().copy())
            if averaging or epoch == EPOCHS - 1:  # the last epoch has no next update
                continue
            if len(earlier) > case.nonmono and losses[epoch] > min(
                earlier[: -case.nonmono]
            ):
                fired = epoch + 1
                optimizer = torch.optim.ASGD(
                    [w],
                    lr=case.lr,
                    t0=0,
                    lambd=case.lambd,
                    weight_decay=case.wdecay,
                )
            earlier.append(losses[epoch])
    return Run(fired, np.stack(params), np.stack(averages))


def problem(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the initial weight, and the gradients of all updates."""
    params, gradients = draw_problem(dtype, EPOCHS * UPDATES, SHAPES)
    return params["vector"], gradients["vector"]


def main() -> None:
    """Record every case and sequence of losses in both dtypes."""
    check_torch()
    arrays = {"recipe": np.array(RECIPE)}
    picked = np.array(CHECKPOINTS) - 1
    for dtype in DTYPES:
        for name, case in CASES.items():
            runs = [run_torch(case, *problem(dtype), row) for row in draw_losses()]
            where = f"{dtype}/{name}"
            arrays[f"{where}/fired"] = np.array([run.fired for run in runs], np.int8)
            arrays[f"{where}/params"] = np.stack([run.params[picked] for run in runs])
            arrays[f"{where}/average"] = np.stack([run.average[picked] for run in runs])
    np.savez_compressed(FIXTURES, **arrays)


if __name__ == "__main__":
    main()
