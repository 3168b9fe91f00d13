# SPDX-License-Identifier: Apache-2.0
"""The lesson's training in one process and in two: the same weights.

    python -m benchmarks.data_parallel

Trains as `examples/data_parallel.py` does, by `pmap` and by `jit`, and by `jit` once
more in two processes that have half of the devices each, as on two hosts. Each way
starts processes of its own, in which the CPU is `--devices` devices.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import command_line
from examples import data_parallel
from examples.data_parallel import BATCH, STEPS, Outcome


class Way(NamedTuple):
    """How `train` is to train, and in how many processes."""

    how: str
    processes: int


WAYS = {"pmap": Way("pmap", 1), "jit": Way("jit", 1), "processes": Way("jit", 2)}


class LostProcessError(Exception):
    """A process of a training has ended before its time."""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(
    way: Way, rank: int, address: str, devices: int, steps: int, answer: Connection
) -> None:
    """What a process does: makes its devices, joins the others, trains, answers."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A lock for threads alone: of one for processes too, one that is killed would leak.
    tqdm.set_lock(threading.RLock())
    # Gloo reports every connection on standard output.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // way.processes)
    if way.processes > 1:
        jax.distributed.initialize(address, way.processes, rank)
    outcome = data_parallel.train(way.how, steps)
    if rank == 0:
        answer.send(outcome)
    if way.processes > 1:
        jax.distributed.shutdown()  # which waits for the others


def train_in_processes(name: str, devices: int, steps: int) -> Outcome:
    """Trains in processes of its own; if one is lost, all end."""
    way = WAYS[name]
    context = multiprocessing.get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        context.Process(target=_work, args=(way, rank, address, devices, steps, answer))
        for rank in range(way.processes)
    ]
    try:
        for process in processes:
            process.start()
        while True:
            codes = [process.exitcode for process in processes]
            for rank, code in enumerate(codes, start=1):
                if code:
                    raise LostProcessError(
                        f"{name}: process {rank} of {len(codes)} ended with exit code"
                        f" {code}"
                    )
            pairs = zip(processes, codes, strict=True)
            running = [process.sentinel for process, code in pairs if code is None]
            if not running:
                return receiver.recv()
            multiprocessing.connection.wait(running)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def main(argv: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Trains in each way, prints the table and returns what was measured."""
    parser = command_line.Parser("Train in one process and in two; compare.")
    parser.add_argument(
        "--devices",
        type=command_line.number(
            int,
            lambda n: n > 0 and n % 2 == 0 and BATCH % n == 0,
            f"an even number that divides a minibatch of {BATCH}",
        ),
        default=8,
        help="how many to make of the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=command_line.count,
        default=STEPS,
        help="minibatches to train on (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    try:
        outcomes = {name: train_in_processes(name, **vars(options)) for name in WAYS}
    except LostProcessError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    data_parallel.report(outcomes)
    losses = [outcome.average_loss for outcome in outcomes.values()]
    print(f"\nThe averages' losses differ by {np.ptp(losses):.1e} at most.")
    return outcomes


if __name__ == "__main__":
    main()
