# SPDX-License-Identifier: Apache-2.0
"""Cost of averaging per optimizer step, compared with optax and PyTorch.

    python -m benchmarks.step_cost

Times one optimizer step without a model, in float32 and with constant gradients. The
trees are one leaf, the shapes of GPT-2 small, and 1,000 small leaves. In JAX, steps are
compiled and donate parameters and state. PyTorch's steps are those of its
documentation, with its default number of threads. Its ASGD is also compiled, if there
is a C++ compiler.

All steps are timed in one run in a random order (`benchmarks.harness`). An array that
is negated in place, timed in the same run, shows how fast memory is read and written.
Compile times come first: JAX's from three compilations of each step, in rotation and
with its caches cleared, PyTorch's from one.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import Patch
from tqdm import tqdm

from asgd_optax import asgd, average_iterates
from benchmarks import by_hand, harness
from tools import command_line, report

with command_line.needs("bench"):
    import torch
    from torch.optim import swa_utils

RATE = 1e-4
BASE = "optax.sgd"
HAND, OURS = ", by hand", ", average_iterates"
BY_HAND = "optax, or by hand"
COMPILED = "torch ASGD, compiled"
COPIES = ("copy in JAX", "copy in torch")
# Leaves are filled with repeats of these, which is fast at any size.
NORMALS = np.random.default_rng(0).standard_normal(4096, np.float32)
ON_GPU = jax.default_backend() == "gpu"
SAME_DEVICE = torch.cuda.is_available() or not ON_GPU
DEVICE = "cuda" if ON_GPU and SAME_DEVICE else "cpu"  # torch's

Call = Callable[[], Any]
Shape = tuple[int, ...]


class Tree(NamedTuple):
    """The shapes of a parameter tree.

    Attributes:
      title: its name in the report.
      shapes: one per leaf.
      calls: how many steps make one repetition.
      torch_compiles: whether torch.compile finishes in reasonable time.
    """

    title: str
    shapes: Sequence[Shape]
    calls: int
    torch_compiles: bool = True

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes)


class Method(NamedTuple):
    """An optimizer in JAX, as pure functions."""

    init: Callable[[Any], Any]  # takes params
    step: Callable[[Any, Any, Any], tuple[Any, Any]]  # takes params, state, gradients


class Compiled(NamedTuple):
    """A compiled step, its compile time, and XLA's count of bytes."""

    step: Callable[..., Any]
    seconds: Sequence[float]  # to trace and to compile; in torch, one number for both
    bytes: float | None = None  # per parameter


def of_optax(tx: optax.GradientTransformation) -> Method:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Method(tx.init, step)


def sgd_and(average: by_hand.ByHand) -> Method:
    """Add a hand-written average to SGD."""
    sgd = of_optax(optax.sgd(RATE))

    def init(params: Any) -> Any:
        return sgd.init(params), average.init(params)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        inner, kept = state
        params, inner = sgd.step(params, inner, grads)
        return params, (inner, average.update(kept, params))

    return Method(init, step)


def torch_params(tree: Tree) -> torch.nn.ParameterList:
    """Return parameters with their gradients, as a module."""
    params = torch.nn.ParameterList(
        torch.tensor(leaf, device=DEVICE) for leaf in normals(tree)
    )
    for p in params:
        p.grad = p.detach().clone()
    return params


def torch_sgd(tree: Tree) -> Call:
    return torch.optim.SGD(torch_params(tree), lr=RATE).step


def torch_averaged(tree: Tree, multi_avg_fn: Any = None) -> Call:
    params = torch_params(tree)
    optimizer = torch.optim.SGD(params, lr=RATE)
    average = swa_utils.AveragedModel(params, multi_avg_fn=multi_avg_fn)

    def step() -> None:
        optimizer.step()
        average.update_parameters(params)

    return step


def torch_asgd(tree: Tree, **options: Any) -> Call:
    return torch.optim.ASGD(torch_params(tree), lr=RATE, t0=0, **options).step


def in_jax() -> dict[str, Method]:
    """Return the rows of JAX; each of ours comes after the same written by hand."""
    sgd, rules = optax.sgd(RATE), by_hand.RULES
    uniform = rules["uniform"]
    rows = {BASE: of_optax(sgd)}
    for name in ("uniform", "EMA", "debiased EMA", "power"):
        ours = average_iterates(rules[name].weighting)
        rows[name + HAND] = sgd_and(by_hand.average(rules[name]))
        rows[name + OURS] = of_optax(optax.chain(sgd, ours))
    compensated = average_iterates(compensated=True)
    rows["compensated" + HAND] = sgd_and(by_hand.average(uniform, compensated=True))
    rows["compensated" + OURS] = of_optax(optax.chain(sgd, compensated))
    rows["asgd" + HAND] = Method(*by_hand.asgd(RATE, t0=0))
    rows["asgd"] = of_optax(asgd(RATE, t0=0))
    rows["asgd, compensated"] = of_optax(asgd(RATE, t0=0, compensated=True))
    rows["optax.adam"] = of_optax(optax.adam(RATE))
    return rows


IN_JAX = in_jax()
IN_TORCH: dict[str, Callable[[Tree], Call]] = {
    "torch SGD": torch_sgd,
    "torch SGD, AveragedModel": torch_averaged,
    "torch SGD, AveragedModel (EMA)": partial(
        torch_averaged, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999)
    ),
    "torch ASGD, for-loop": partial(torch_asgd, foreach=False),
    "torch ASGD, foreach": partial(torch_asgd, foreach=True),
}
# Bytes per parameter, 20 if not listed: parameters and gradients take 12, and each
# average, moment or residual takes 8.
LEAST = {BASE: 12, "torch SGD": 12} | dict.fromkeys(
    ["asgd, compensated", f"compensated{HAND}", f"compensated{OURS}", "optax.adam"], 28
)


def gpt2(width: int, layers: int, vocabulary: int, positions: int) -> list[Shape]:
    """Return the shapes of GPT-2's parameters."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
    ]
    mlp: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    embeddings: list[Shape] = [(vocabulary, width), (positions, width)]
    return embeddings + layers * (norm + attention + norm + mlp) + norm


def trees(quick: bool) -> list[Tree]:
    if quick:
        return [
            Tree("8 k in one leaf", [(2**13,)], calls=2),
            Tree("5 k in GPT-2's shapes", gpt2(16, 1, 64, 16), 2, torch_compiles=False),
            Tree("1 k in 20 leaves", 20 * [(8, 8)], 2, torch_compiles=False),
        ]
    return [
        Tree("33 M in one leaf", [(2**25,)], calls=6),
        Tree("124 M in GPT-2's shapes", gpt2(768, 12, 50257, 1024), 3),
        Tree("4 M in 1,000 leaves", 1000 * [(64, 64)], 10, torch_compiles=False),
    ]


def normals(tree: Tree) -> Iterator[np.ndarray]:
    """Return standard normal leaves, which no step turns into subnormal numbers."""
    return (np.resize(NORMALS, shape) for shape in tree.shapes)


def compile_jax(
    methods: Mapping[str, Method], tree: Tree, rotations: int
) -> dict[str, Compiled]:
    """Compile all steps for a tree several times, in rotation and without caches."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in tree.shapes]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    steps = {}
    for _ in range(rotations):
        for name, method in methods.items():
            state = jax.eval_shape(method.init, params)
            jax.clear_caches()
            gc.collect()  # or the next compilation pays for it
            began = time.perf_counter()
            jitted = jax.jit(method.step, donate_argnums=(0, 1))
            lowered = jitted.lower(params, state, params)
            between = time.perf_counter()
            steps[name] = lowered.compile()
            seconds[name].append((between - began, time.perf_counter() - between))
    return {
        name: Compiled(
            step,
            [statistics.median(column) for column in zip(*seconds[name], strict=True)],
            cost["bytes accessed"] / tree.size
            if (cost := step.cost_analysis())
            else None,
        )
        for name, step in steps.items()
    }


def compile_torch(tree: Tree) -> Compiled:
    """Compile ASGD as in PyTorch's tutorial on compiled optimizers.

    It is capturable, so that the step's count, which selects the average, is a tensor.
    """
    asgd_step = torch_asgd(tree, foreach=True, capturable=True)
    step = waiting(torch.compile(lambda: asgd_step()))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return Compiled(step, [seconds[0] - seconds[-1]])


def waiting(step: Call) -> Call:
    """Make the step wait for the GPU, if there is one."""

    def call() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


def contestants(
    tree: Tree, compiled: Mapping[str, Compiled]
) -> dict[str, harness.Contestant]:
    """Return everything that is timed on a tree."""

    def jax_step(name: str) -> Call:
        params, grads = ([jnp.array(leaf) for leaf in normals(tree)] for _ in range(2))
        carry = jax.block_until_ready((params, IN_JAX[name].init(params)))

        def call() -> None:
            nonlocal carry
            carry = jax.block_until_ready(compiled[name].step(*carry, grads))

        return call

    def torch_step(name: str) -> Call:
        step = waiting(IN_TORCH[name](tree))
        # ASGD's first two steps copy the parameters; the harness makes the second.
        step()
        return step

    def jax_copy() -> Call:
        negate = jax.jit(jnp.negative, donate_argnums=0)
        x = jnp.ones(3 * tree.size, jnp.float32)

        def call() -> None:
            nonlocal x
            x = jax.block_until_ready(negate(x))

        return call

    def torch_copy() -> Call:
        return waiting(torch.ones(3 * tree.size, device=DEVICE).neg_)

    setups: dict[str, Callable[[], Call]] = {
        name: partial(jax_step, name) for name in IN_JAX
    }
    setups[COPIES[0]] = jax_copy
    if SAME_DEVICE:
        setups |= {name: partial(torch_step, name) for name in IN_TORCH}
        setups[COPIES[1]] = torch_copy
    if COMPILED in compiled:
        # It keeps its arrays for the whole run, because other arrays recompile it.
        setups[COMPILED] = lambda: compiled[COMPILED].step
    return {
        name: harness.Contestant(setup, tree.calls) for name, setup in setups.items()
    }


def section(
    tree: Tree, times: Mapping[str, harness.Time], compiled: Mapping[str, Compiled]
) -> str:
    """Format the table of a tree, and the bandwidth it refers to."""
    copies = {name: times[name].median for name in COPIES if name in times}

    def row(name: str) -> list[str]:
        step, least, made = times[name], LEAST.get(name, 20), compiled.get(name)
        same = times.get(name.removesuffix(OURS) + HAND)
        cells = [
            name,
            "{:.3g} [{:.3g}, {:.3g}]".format(*(1e3 * seconds for seconds in step)),
            f"{step.median / times[BASE].median:.2f}",
            f"{step.median / same.median:.2f}" if same else "-",
            f"{least}",
            f"{made.bytes:.1f}" if made and made.bytes else "-",
            # The copy moves three arrays at 8 bytes per element.
            f"{100 * least / 24 * min(copies.values()) / step.median:.0f}",
        ]
        if made is None:
            return [*cells, "-", "-"]
        ratio = sum(made.seconds) / sum(compiled[BASE].seconds)
        seconds = " + ".join(f"{seconds:.2f}" for seconds in made.seconds)
        return [*cells, seconds, f"{ratio:.1f}"]

    header = [tree.title, "step (ms)", "ratio", "by hand", "least bytes", "XLA's bytes"]
    header += ["bandwidth (%)", "compile (s)", "ratio"]
    table = report.table(header, [row(name) for name in times if name not in copies])
    speeds = [f"{24e-9 * tree.size / s:.1f} ({name})" for name, s in copies.items()]
    return (
        f"{table}\n\n{tree.size:,} parameters, leaves: {len(tree.shapes):,}."
        f" Bandwidth in GB/s: {', '.join(speeds)}."
    )


PAGE = """\
# Cost of averaging per optimizer step

One step alone, float32, gradients fixed. JAX on {jax_device}, torch on \
{torch_device}. Medians [quartiles] of {repetitions} repetitions.

- *ratio*: over `{base}`; *by hand*: over the same rule as a `tree_map` after
  `apply_updates` (`by_hand.py`). The rows of averages use `{base}` too.
- *least bytes*: per parameter, if each array is read once and, if it changes, written
  once. *XLA's bytes*: XLA's count for the compiled step.
- *bandwidth*: least bytes over time, in percent of the faster copy in the same run (an
  array as large as three of the tree's, negated in place). A step that reads more than
  it writes may exceed 100 %.
- *compile*: to trace and lower + to compile, medians of {rotations}. For torch, the
  first call minus a later one.
- *AveragedModel*: with its defaults, and with `get_ema_multi_avg_fn`.
- *torch ASGD, compiled*: `torch.compile` of the step with `foreach` and `capturable`.
  {left_out}

{sections}
"""


# The bars of the two charts, by their labels.
CHARTS = {
    "An average on top of SGD, in JAX": {
        "SGD alone": BASE,
        "EMA, by hand": "EMA" + HAND,
        "EMA": "EMA" + OURS,
        "uniform, by hand": "uniform" + HAND,
        "uniform": "uniform" + OURS,
        "asgd, by hand": "asgd" + HAND,
        "asgd": "asgd",
        "Adam alone": "optax.adam",
    },
    "PyTorch, and this library": {
        "SGD alone": "torch SGD",
        "AveragedModel, EMA": "torch SGD, AveragedModel (EMA)",
        "AveragedModel": "torch SGD, AveragedModel",
        "ASGD, compiled": COMPILED,
        "ASGD, for-loop": "torch ASGD, for-loop",
        "ASGD, foreach": "torch ASGD, foreach",
        "EMA": "EMA" + OURS,
        "asgd": "asgd",
    },
}


def draw(title: str, medians: Mapping[str, float], output: Path) -> None:
    """Draw the steps of one tree in two charts; `medians` are in seconds."""
    plt.style.use(report.STYLE)
    figure, panels = plt.subplots(ncols=2, figsize=(9, 3.6))
    colors = {"this library": "C1", BY_HAND: "C2", "PyTorch": "C3"}

    def source(name: str) -> str:
        if name.startswith("torch"):
            return "PyTorch"
        ours = name.startswith("asgd") or name.endswith(OURS)
        return "this library" if ours and not name.endswith(HAND) else BY_HAND

    for axes, (heading, rows) in zip(panels, CHARTS.items(), strict=True):
        timed = {label: name for label, name in rows.items() if name in medians}
        milliseconds = [1e3 * medians[name] for name in timed.values()]
        color = [colors[source(name)] for name in timed.values()]
        bars = axes.barh(list(timed), milliseconds, color=color)
        axes.bar_label(bars, [f"{ms:.3g}" for ms in milliseconds], padding=3)
        axes.set(title=heading, xlabel="time of a step (ms)")
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.invert_yaxis()
    figure.suptitle(title)
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.savefig(output)
    plt.close(figure)


def left_out(
    tried: Sequence[Tree], compiled: Mapping[str, Mapping[str, Compiled]]
) -> str:
    """Extrapolate the time of torch.compile for the trees where it was not run."""
    done = [tree for tree in tried if COMPILED in compiled[tree.title]]
    if not done:
        return "Not run."
    (seconds,) = compiled[done[-1].title][COMPILED].seconds
    leaf = seconds / len(done[-1].shapes)
    others = ", ".join(
        f"{tree.title} (it would take about {leaf * len(tree.shapes):.0f} s)"
        for tree in tried
        if tree not in done
    )
    return f"Left out, extrapolating from {done[-1].title}: {others}."


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, time, and write the tables and the picture."""
    parser = command_line.report_parser("Cost of averaging per optimizer step.")
    options = parser.parse_args(argv)
    rotations, repetitions = (1, 2) if options.quick else (3, 7)
    tried = trees(options.quick)
    torch_compiles = SAME_DEVICE and harness.has_compiler()
    if torch_compiles:
        # Or PyTorch would reuse what an earlier run compiled.
        torch.compiler.config.force_disable_caches = True
        # The first use sets the compiler up, which is not to be timed.
        compile_torch(Tree("", [(1,)], calls=1))
    compiled, timed = {}, {}
    for tree in tqdm(tried, desc="compiling", unit="tree"):
        made = compile_jax(IN_JAX, tree, rotations)
        if torch_compiles and tree.torch_compiles:
            made[COMPILED] = compile_torch(tree)
        compiled[tree.title], timed[tree.title] = made, contestants(tree, made)
    flat = harness.measure(
        {
            f"{title}: {name}": contestant
            for title, row in timed.items()
            for name, contestant in row.items()
        },
        repetitions,
    )
    times = {
        title: {name: flat[f"{title}: {name}"] for name in row}
        for title, row in timed.items()
    }
    text = PAGE.format(
        jax_device=jax.devices()[0].device_kind,
        torch_device=DEVICE if SAME_DEVICE else "another device, left out",
        repetitions=repetitions,
        rotations=rotations,
        base=BASE,
        left_out=left_out(tried, compiled),
        sections="\n\n".join(
            section(tree, times[tree.title], compiled[tree.title]) for tree in tried
        ),
    )
    report.write("benchmarks.step_cost", text, options.output)
    title = tried[1].title  # GPT-2's shapes
    medians = {name: time.median for name, time in times[title].items()}
    draw(title, medians, options.output / "step_cost.png")


if __name__ == "__main__":
    main()
