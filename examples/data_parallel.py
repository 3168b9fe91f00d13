# SPDX-License-Identifier: Apache-2.0
"""One training on many devices: by `pmap`, by sharded arrays, in two processes.

    python examples/data_parallel.py

A Flax network learns scikit-learn's digits by ASGD, each minibatch divided among the
devices. The ways of doing it lead to the same weights, and differ in what a device
has to hold:

- *pmap*: every device keeps all parameters and the whole average. `jax.pmap` still
  works; its successor is `jax.shard_map`, or no mapping at all, which is the next.
- *jit*: parameters and average are divided among the devices ("FSDP"). The step is
  written as for one device, `jax.jit` is told the shardings and finds the
  communication. The update itself has none.
- *processes*: the same in two processes, each with half of the devices, as on two
  hosts.

Each way starts processes of its own, in which the CPU is `--devices` devices. With
`--devices all` the script trains in its own process instead, on the devices it finds:

- all GPUs of a node, or all TPU chips of a host:
  `python examples/data_parallel.py --how jit --devices all`
- a TPU slice of several hosts, on each of them (`gcloud compute tpus tpu-vm ssh NAME
  --worker=all --command=...`):
  `python examples/data_parallel.py --how processes --devices all`
- GPU nodes under Slurm: `srun --ntasks-per-node=8 --gpus-per-task=1
  python examples/data_parallel.py --how processes --devices all`

`jax.distributed.initialize()` finds the other processes of a slice or of a Slurm job.
"""

import argparse
import functools
import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from asgd_optax import asgd, averaged_params

try:
    from examples import command_line, digits
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line
    import digits

NETWORK = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(10)])
NOISE = 0.2  # standard deviation; the pixels lie in [0, 1]
PROCESSES = {"pmap": 1, "jit": 1, "processes": 2}


class Outcome(NamedTuple):
    """What one way of training measured.

    Attributes:
      last_loss: the last iterate's cross-entropy on the test set.
      average_loss: its average's.
      params_bytes: what the params take on the fullest device.
      state_bytes: what the optimizer state takes there.
    """

    last_loss: float
    average_loss: float
    params_bytes: int
    state_bytes: int


class LostProcessError(Exception):
    """A process of a training has ended before its time."""


def loss(params: Any, batch: digits.Data) -> jax.Array:
    """The network's mean cross-entropy."""
    logits = NETWORK.apply({"params": params}, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


def update(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    """Params and state after one step."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def finished(values: Any) -> Any:
    """`values`, on the CPU not before they are there.

    Its devices share threads: those of several steps in flight can wait for one
    another for ever.
    """
    return jax.block_until_ready(values) if jax.default_backend() == "cpu" else values


def train_by_pmap(
    tx: Any, params: Any, batches: Iterator[digits.Data]
) -> tuple[Any, Any]:
    """Params and state, of which every device has its copy, along a first axis."""
    devices = jax.device_count()

    @functools.partial(jax.pmap, axis_name="devices", donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: digits.Data) -> tuple[Any, Any]:
        grads = jax.lax.pmean(jax.grad(loss)(params, batch), "devices")
        return update(tx, params, state, grads)

    copies = jax.tree.map(lambda x: np.stack([x] * devices), params)
    params = jax.pmap(lambda x: x)(copies)
    state = jax.pmap(tx.init)(params)
    for batch in batches:
        divided = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        params, state = finished(step(params, state, divided))
    return params, state


def train_by_jit(
    tx: Any, params: Any, batches: Iterator[digits.Data]
) -> tuple[Any, Any]:
    """Params and state, divided among all devices of all processes."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))

    def sharding_of(x: Any) -> NamedSharding:
        # Along the first dimension that the devices divide; what has none is copied.
        for axis, size in enumerate(x.shape):
            if size % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, "devices"))
        return NamedSharding(mesh, PartitionSpec())

    def spread(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        # Every process has all of `x`, and puts its devices' part on them.
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    def step(params: Any, state: Any, batch: digits.Data) -> tuple[Any, Any]:
        return update(tx, params, state, jax.grad(loss)(params, batch))

    params = jax.tree.map(lambda x: spread(x, sharding_of(x)), params)
    state = jax.jit(tx.init)(params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    by_row = NamedSharding(mesh, PartitionSpec("devices"))
    for batch in batches:
        divided = jax.tree.map(lambda x: spread(x, by_row), batch)
        params, state = finished(step(params, state, divided))
    return params, state


def bytes_on_a_device(tree: Any) -> int:
    """What the arrays of `tree` take on the fullest of this process's devices."""
    held: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def train(how: str, batch_size: int, rate: float, steps: int) -> Outcome:
    """Trains on the devices of this process, or of all that have been joined."""
    training, _, test = digits.load_splits()
    # Averaging begins halfway.
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), asgd(rate, lambd=0.0, t0=steps // 2)
    )
    # As NumPy arrays, so that they lie on no device.
    params = NETWORK.init(jax.random.key(0), training.images[:1])["params"]
    params = jax.tree.map(np.asarray, params)
    batches = digits.minibatches(training, batch_size, NOISE, seed=0)
    progress = tqdm(
        range(steps), desc=how, unit="step", disable=jax.process_index() != 0
    )
    train_ = train_by_pmap if how == "pmap" else train_by_jit
    params, state = train_(tx, params, (next(batches) for _ in progress))
    measured = bytes_on_a_device(params), bytes_on_a_device(state)
    average = averaged_params(state, params)
    if how == "pmap":
        params, average = jax.tree.map(lambda x: x[0], (params, average))
    score = jax.jit(loss)
    return Outcome(float(score(params, test)), float(score(average, test)), *measured)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(
    rank: int, address: str, devices: int, answer: Any, settings: dict[str, Any]
) -> None:
    """What a process does: makes its devices, joins the others, trains, answers."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A lock for threads alone: of one for processes too, one that is killed would leak.
    tqdm.set_lock(threading.RLock())
    # Gloo reports every connection on standard output.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    processes = PROCESSES[settings["how"]]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, rank)
    outcome = train(**settings)
    if rank == 0:
        answer.send(outcome)
    if processes > 1:
        jax.distributed.shutdown()  # which waits for the others


def train_in_processes(devices: int, settings: dict[str, Any]) -> Outcome:
    """Trains in processes of its own; if one is lost, all end."""
    context = multiprocessing.get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        context.Process(target=_work, args=(rank, address, devices, answer, settings))
        for rank in range(PROCESSES[settings["how"]])
    ]
    try:
        for process in processes:
            process.start()
        while True:
            codes = [process.exitcode for process in processes]
            for rank, code in enumerate(codes, start=1):
                if code:
                    raise LostProcessError(
                        f"{settings['how']}: process {rank} of {len(codes)} ended with"
                        f" exit code {code}"
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


def table(outcomes: dict[str, Outcome]) -> str:
    """The losses, and the memory per device."""
    lines = [
        "|           | test loss, last | test loss, average | params (kB a device)"
        " | optimizer state (kB a device) |",
        "| --------- | --------------- | ------------------ | --------------------"
        " | ----------------------------- |",
    ]
    for how, outcome in outcomes.items():
        lines.append(
            f"| {how:9} | {outcome.last_loss:<15.6f} | {outcome.average_loss:<18.6f}"
            f" | {outcome.params_bytes / 1e3:<20.1f}"
            f" | {outcome.state_bytes / 1e3:<29.1f} |"
        )
    return "\n".join(lines)


def _parse(
    argv: Sequence[str] | None, examples: int
) -> tuple[argparse.Namespace, command_line.Parser]:
    """The options, checked as far as they can be before devices are looked for."""
    count = command_line.count
    parser = command_line.Parser("Train on many devices, in three ways; compare.")
    parser.add_argument(
        "--how",
        choices=[*PROCESSES, "all"],
        default="all",
        help="pmap: params and average on every device; jit: divided among the"
        " devices; processes: divided among those of two processes; or all three,"
        " one after the other (default: %(default)s)",
    )
    parser.add_argument(
        "--devices",
        type=lambda text: text if text == "all" else count(text),
        default=8,
        help="how many to make of the CPU; all: train on those there are, with --how"
        " processes on those of all processes that were started so (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=command_line.count_to(examples, "the size of the training set"),
        default=64,
        help="images in a minibatch, on all devices together (default: %(default)s)",
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=1.0,
        help="learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=200,
        help="minibatches to train on (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.devices == "all":
        if options.how == "all":
            parser.error("argument --how: choose one, to train on --devices all")
        return options, parser
    _check_batch(parser, options.batch_size, options.devices)
    if options.how in ("processes", "all") and options.devices % 2:
        parser.error(
            "argument --devices: two processes share them, so the number must be even,"
            f" not {options.devices}"
        )
    return options, parser


def _check_batch(parser: command_line.Parser, batch_size: int, devices: int) -> None:
    if batch_size % devices:
        parser.error(
            f"argument --batch-size: {devices} devices cannot share {batch_size} images"
            " evenly: choose a multiple of their number"
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Trains, prints the table and returns, for each way, what was measured."""
    examples = len(digits.load_splits()[0].labels)
    options, parser = _parse(argv, examples)
    settings = vars(options).copy()
    devices = settings.pop("devices")
    ways = [*PROCESSES] if options.how == "all" else [options.how]
    run: Callable[..., Outcome] = functools.partial(train_in_processes, devices)
    if devices == "all":
        if options.how == "processes":
            try:
                jax.distributed.initialize()
            except (ValueError, RuntimeError) as error:
                parser.error(f"argument --how: finds no other processes: {error}")
        _check_batch(parser, options.batch_size, jax.device_count())
        run = lambda settings: train(**settings)  # noqa: E731
    try:
        outcomes = {how: run({**settings, "how": how}) for how in ways}
    except LostProcessError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if jax.process_index() == 0:
        print(table(outcomes))
        losses = [outcome.average_loss for outcome in outcomes.values()]
        if len(losses) > 1:
            print(f"\nThe averages' losses differ by {np.ptp(losses):.1e} at most.")
    return outcomes


if __name__ == "__main__":
    main()
