# SPDX-License-Identifier: Apache-2.0
"""Data-parallel training in one process and in two: same weights, memory per device.

    python -m benchmarks.data_parallel

Trains as `examples/data_parallel.py` does: by `pmap`, by `jit`, and by `jit` in two
processes with half of the devices each, as on two hosts. Every variant starts its own
processes, in which the CPU acts as `--devices` devices.
"""

import multiprocessing
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from examples import data_parallel
from examples.data_parallel import BATCH, STEPS, Outcome
from tools import command_line


class Way(NamedTuple):
    """The argument of `train`, and the number of processes."""

    how: str
    processes: int


WAYS = {"pmap": Way("pmap", 1), "jit": Way("jit", 1), "processes": Way("jit", 2)}


def _train(way: Way, rank: int, address: str, devices: int, steps: int) -> Outcome:
    """Train in this process, as number `rank` of the processes of a way."""
    # Gloo reports every connection on standard output.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // way.processes)
    if way.processes > 1:
        jax.distributed.initialize(address, way.processes, rank)
    outcome = data_parallel.train(way.how, steps)
    if way.processes > 1:
        jax.distributed.shutdown()  # waits for the others
    return outcome


def train_in_processes(name: str, devices: int, steps: int) -> Outcome:
    """Train in new processes."""
    way = WAYS[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(way.processes, mp_context=spawn) as pool:
        outcomes = [
            pool.submit(_train, way, rank, address, devices, steps)
            for rank in range(way.processes)
        ]
        return outcomes[0].result()


def main(argv: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Train in each way, print the table and return the outcomes."""
    parser = command_line.Parser("Train in one process and in two; compare.")
    parser.add_argument(
        "--devices",
        type=command_line.number(
            int,
            lambda n: n > 0 and n % 2 == 0 and BATCH % n == 0,
            f"an even number that divides a minibatch of {BATCH}",
        ),
        default=8,
        help="devices to make of the CPU (default: %(default)s)",
    )
    command_line.add_steps(parser, STEPS)
    options = parser.parse_args(argv)
    outcomes = {name: train_in_processes(name, **vars(options)) for name in WAYS}
    data_parallel.report(outcomes)
    losses = [outcome.average_loss for outcome in outcomes.values()]
    print(f"\nThe losses of the averages differ by at most {np.ptp(losses):.1e}.")
    return outcomes


if __name__ == "__main__":
    main()
