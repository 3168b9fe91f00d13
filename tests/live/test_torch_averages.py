# SPDX-License-Identifier: Apache-2.0
"""The installed averages for PyTorch, compared with their rules and with ours.

`python -m tests.live.test_torch_averages` prints the numbers of the page.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ema_pytorch import EMA, KarrasEMA, PostHocEMA
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from asgd_optax import (
    average_iterates,
    exponential_weighting,
    gamma_from_width,
    power_weighting,
    running_average,
)
from tests.support import enable_x64
from tests.test_coming_from_torch import (
    ROWS,
    STEPS,
    SWALR,
    TOLERANCE,
    largest_difference,
    our_averages,
    random_walk,
    rule_averages,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.training_utils import EMAModel
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging


def load_timm() -> type:
    """Load `ModelEmaV3` from its file, because all of timm would need torchvision."""
    (folder,) = importlib.util.find_spec("timm").submodule_search_locations
    path = Path(folder, "utils", "model_ema.py")
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


ModelEmaV3 = load_timm()

# A function of t, to be called after the t-th update, and the tensor of the average.
Peer = tuple[Callable[[int], None], torch.Tensor]


def averaged_model(model, s=1, k=1, d=None, **options) -> Peer:
    if d is not None:
        options["multi_avg_fn"] = swa_utils.get_ema_multi_avg_fn(d)
    average = AveragedModel(model, **options)

    def update(t):
        if t >= s and (t - s) % k == 0:
            average.update_parameters(model)

    return update, average.module.weight


def ema_pytorch(model, d, u, k, g, p, m) -> Peer:
    options = {"update_after_step": u, "update_every": k, "inv_gamma": g}
    average = EMA(model, beta=d, power=p, min_value=m, **options)
    return lambda t: average.update(), average.ema_model.weight


def ema_pytorch_power(model, gamma, k) -> Peer:
    average = KarrasEMA(model, gamma=gamma, update_every=k)
    return lambda t: average.update(), average.ema_model.weight


def timm(model, d, u=None, g=None, p=None, **options) -> Peer:
    if g is not None:
        options |= {"use_warmup": True, "warmup_gamma": g, "warmup_power": p}
    average = ModelEmaV3(model, decay=d, update_after_step=u or 0, **options)
    step = (lambda t: None) if u is None else (lambda t: t)
    return lambda t: average.update(model, step=step(t)), average.module.weight


def diffusers(model, d, u, g=None, p=None, **options) -> Peer:
    if g is not None:
        options |= {"use_ema_warmup": True, "inv_gamma": g, "power": p}
    average = EMAModel(model.parameters(), decay=d, update_after_step=u, **options)
    return lambda t: average.step(model.parameters()), average.shadow_params[0]


PEERS = {
    "torch": averaged_model,
    "ema-pytorch, power": ema_pytorch_power,
    "ema-pytorch": ema_pytorch,
    "timm": timm,
    "diffusers": diffusers,
}
NAMES = [name for name in ROWS if any(name.startswith(peer) for peer in PEERS)]
NAMES = [name for name in NAMES if not name.startswith("torchtitan")]


def peer_of(name: str) -> Callable[..., Peer]:
    return next(make for peer, make in PEERS.items() if name.startswith(peer))


def their_averages(make, iterates, dtype=torch.float64, **arguments) -> np.ndarray:
    """Return a library's average after each update, of a model with these weights."""
    model = torch.nn.Linear(1, iterates.shape[1], bias=False, dtype=dtype)

    def set_weights(iterate):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(iterate)[:, None])

    set_weights(iterates[0])
    update, average = make(model, **arguments)
    averages = []
    for t, iterate in enumerate(iterates[1:], 1):
        set_weights(iterate)
        update(t)
        averages.append(average.detach()[:, 0].double().numpy().copy())
    return np.stack(averages)


def tolerance_of(name: str) -> float:
    """Return the tolerance: only ema-pytorch computes a growing decay in float32."""
    return 1e-6 if name.startswith("ema-pytorch") and "power" not in name else TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_library_follows_its_rule_and_ours_equals_it(name):
    row, iterates = ROWS[name], random_walk()
    theirs = their_averages(peer_of(name), iterates, **row.arguments)
    rule = rule_averages(row.weights(), iterates)
    assert largest_difference(theirs, rule) <= tolerance_of(name)
    with enable_x64(True):
        ours = our_averages(row.ours(), iterates)
    assert largest_difference(ours, theirs, row.since) <= tolerance_of(name)


def several_at_once() -> float:
    """Return the difference from the rule of the path torch takes on accelerators."""
    iterates = random_walk()
    whole = swa_utils.get_swa_multi_avg_fn()
    theirs = their_averages(averaged_model, iterates, multi_avg_fn=whole)
    rule = rule_averages(ROWS["torch, each step"].weights(), iterates)
    return largest_difference(theirs, rule)


def test_averaged_model_of_several_tensors_computes_its_weight_in_float32():
    assert 1e-9 < several_at_once() < 1e-7


class Iterates(LightningModule):
    """Train a vector on noise, and record it and its average."""

    def __init__(self, average):
        super().__init__()
        self.average = [average]  # in a list, so that it is not part of the model
        self.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.iterates, self.averages = [self.weight.tolist()], []

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)

    def training_step(self, batch, index):
        # Read before the next step, because callbacks run at the epoch's end.
        self.read()
        return (self.weight * batch[0]).sum()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.iterates.append(self.weight.tolist())

    def read(self):
        self.averages.append(self.average[0]._average_model.module.weight.tolist())


def run_lightning(callback, epoch=6) -> tuple[np.ndarray, np.ndarray]:
    """Return p(0), …, p(60), and the averages after the updates 1, …, 60."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(epoch, 3, dtype=torch.float64))
    model = Iterates(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(data, batch_size=1, shuffle=True)
        trainer.fit(model, loader)
    model.read()
    return np.array(model.iterates), np.array(model.averages[1:])


LIGHTNING = {
    "torch, each step": lambda: WeightAveraging(),
    "Lightning": lambda d, s, k: EMAWeightAveraging(
        decay=d, update_starting_at_step=s, update_every_n_steps=k
    ),
    "Lightning, epochs": lambda d, e, E: EMAWeightAveraging(  # noqa: N803
        decay=d, update_starting_at_epoch=e
    ),
    "Lightning, each epoch": lambda d, e, E: EMAWeightAveraging(  # noqa: N803
        decay=d, update_starting_at_epoch=e, update_every_n_steps=0
    ),
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning_follows_its_rule_and_ours_equals_it(name):
    row = ROWS[name]
    # `WeightAveraging` is an `AveragedModel` after each step, without arguments.
    arguments = {} if name.startswith("torch") else row.arguments
    iterates, theirs = run_lightning(LIGHTNING[name](**arguments))
    assert len(iterates) == STEPS + 1
    rule = rule_averages(row.weights(), iterates)
    assert largest_difference(theirs, rule) <= TOLERANCE
    with enable_x64(True):
        ours = our_averages(row.ours(), iterates)
    assert largest_difference(ours, theirs, row.since) <= TOLERANCE


@pytest.mark.parametrize("anneal", SWALR)
def test_swalr_equals_our_schedule(anneal):
    lr, swa_lr, A = 0.7, 0.05, 25  # noqa: N806
    optimizer = torch.optim.SGD([torch.ones(3, requires_grad=True)], lr=lr)
    scheduler = swa_utils.SWALR(optimizer, swa_lr, A, anneal)
    theirs = []
    for _ in range(STEPS):
        theirs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    names = {"optax": optax, "lr": lr, "swa_lr": swa_lr, "A": A}
    with enable_x64(True):
        ours = [eval(SWALR[anneal], names)(jnp.asarray(n)) for n in range(STEPS)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_update_bn_equals_update_batch_stats():
    from flax import nnx

    from asgd_optax.flax import update_batch_stats

    size = 8
    batches = np.random.default_rng(0).standard_normal((STEPS, size, 3)) + 2
    theirs = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    swa_utils.update_bn([torch.tensor(x) for x in batches], theirs)
    with enable_x64(True):
        ours = nnx.BatchNorm(3, dtype=jnp.float64, rngs=nnx.Rngs(0))
        for name in ("mean", "var"):
            setattr(ours, name, nnx.BatchStat(jnp.zeros(3)))
        update_batch_stats(ours, batches)
        mean, var = np.asarray(ours.mean[...]), np.asarray(ours.var[...])
    np.testing.assert_allclose(mean, theirs.running_mean, rtol=TOLERANCE)
    unbiased = var * size / (size - 1)
    np.testing.assert_allclose(unbiased, theirs.running_var, rtol=TOLERANCE)


def buffers_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: buffer.numpy().copy() for name, buffer in model.named_buffers()}


def all_buffers(model, **options) -> tuple[Callable[[], None], torch.nn.Module]:
    average = AveragedModel(model, use_buffers=True, **options)
    return lambda: average.update_parameters(model), average.module


def timm_buffers(model) -> tuple[Callable[[], None], torch.nn.Module]:
    average = ModelEmaV3(model, decay=0.95)
    return lambda: average.update(model), average.module


def ema_pytorch_buffers(model) -> tuple[Callable[[], None], torch.nn.Module]:
    average = EMA(model, beta=0.95, update_after_step=0, update_every=1)
    return average.update, average.ema_model


@pytest.mark.parametrize(
    ("make", "counter", "weighting", "tolerance"),
    [
        # Averaged, and truncated after every step: 1 + (t - 1) / t.
        (all_buffers, 1, None, TOLERANCE),
        (timm_buffers, STEPS, exponential_weighting(0.95, debias=False), TOLERANCE),
        # Never copied.
        (
            ema_pytorch_buffers,
            0,
            exponential_weighting(0.95, warmup=lambda n: 1 - n ** (-2 / 3)),
            1e-6,
        ),
    ],
    ids=["torch", "timm", "ema-pytorch"],
)
def test_float_buffers_are_averaged_like_parameters(
    make, counter, weighting, tolerance
):
    model = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    update, average = make(model)
    rng = np.random.default_rng(0)
    with enable_x64(True):
        mean = running_average(weighting)
        state, average_with = mean.init(buffers_of(model)), jax.jit(mean.update)
        for _ in range(STEPS):
            model(torch.tensor(rng.standard_normal((8, 3))))
            update()
            state = average_with(state, buffers_of(model))
        ours = {name: np.asarray(x) for name, x in mean.value(state).items()}
    theirs = buffers_of(average)
    assert theirs["num_batches_tracked"] == counter
    assert ours["num_batches_tracked"] == STEPS
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance)


def look_back(averages: np.ndarray) -> float:
    """Return the mean age in an average of iterates that are the time, 0 to 1."""
    return 1 - averages[-1, 0]


SKIPPED = 10_000  # updates


def skipping_peer(k: int) -> np.ndarray:
    times = np.linspace(0, 1, SKIPPED + 1)[:, None]
    return their_averages(ema_pytorch_power, times, gamma=gamma_from_width(0.1), k=k)


def skipping_ours(k: int) -> np.ndarray:
    times = np.linspace(0, 1, SKIPPED + 1)[:, None]
    weighting = power_weighting(gamma_from_width(0.1))
    with enable_x64(True):
        return our_averages(average_iterates(weighting, every=k), times)


@pytest.mark.parametrize(("k", "theirs"), [(1, 0.112), (10, 0.558), (100, 0.927)])
def test_power_average_with_skipped_updates_has_its_width_only_in_ours(k, theirs):
    assert look_back(skipping_peer(k)) == pytest.approx(theirs, abs=5e-4)
    right = 1 / (gamma_from_width(0.1) + 2)
    assert look_back(skipping_ours(k)) == pytest.approx(right, rel=0.05)


def test_posthoc_ema_has_the_same_gammas(tmp_path):
    model = torch.nn.Linear(1, 3, bias=False)
    average = PostHocEMA(
        model, sigma_rels=(0.05, 0.1), update_every=1, checkpoint_folder=str(tmp_path)
    )
    gammas = [ema.gamma for ema in average.ema_models]
    assert gammas == pytest.approx([gamma_from_width(0.05), gamma_from_width(0.1)])
    assert all(isinstance(ema, KarrasEMA) for ema in average.ema_models)


# For bfloat16: 1 and then 3,000 times 2 for an EMA; evenly spaced 1, …, 2 for others.
JUMP = np.repeat([1.0, 2.0], [2, 3000])[:, None]
DRIFT = np.linspace(1, 2, 3001)[:, None]
HALF = {
    "torch, each step": (DRIFT, averaged_model, {"s": 1, "k": 1}),
    "torch EMA, each step": (JUMP, averaged_model, {"d": 0.999, "s": 1, "k": 1}),
    "Lightning": (JUMP, averaged_model, {"avg_fn": swa_utils.get_ema_avg_fn(0.999)}),
    "ema-pytorch, each step": (
        JUMP,
        ema_pytorch,
        {"d": 0.999, "u": 0, "k": 1, "g": 1.0, "p": 1.0, "m": 0.999},
    ),
    "ema-pytorch, power, each step": (
        DRIFT,
        ema_pytorch_power,
        {"gamma": gamma_from_width(0.1), "k": 1},
    ),
    "timm, step": (JUMP, timm, {"d": 0.999, "u": 0}),
    "diffusers, warmup": (
        JUMP,
        diffusers,
        {"d": 0.999, "u": 0, "g": 1.0, "p": 2 / 3, "min_decay": 0.999},
    ),
}


def half_precision(name: str) -> tuple[np.ndarray, float, float]:
    """Return averages of 1,000 bfloat16 weights: theirs, ours, and the true value."""
    iterates, make, arguments = HALF[name]
    many = np.repeat(iterates, 1000, axis=1)
    theirs = their_averages(make, many, torch.bfloat16, **arguments)[-1]
    if iterates is JUMP:
        line, right = ROWS["torch EMA, each step"], 2 - 0.999**3000
        tx = line._replace(arguments={"d": 0.999}).ours()
    else:
        row = ROWS[name]._replace(arguments=arguments)
        tx, rounded = row.ours(), torch.tensor(iterates).bfloat16().double().numpy()
        right = rule_averages(row.weights(len(iterates) - 1), rounded)[-1, 0]
    ours = our_averages(tx, jnp.asarray(iterates, jnp.bfloat16))[-1, 0]
    return theirs, float(ours), right


@pytest.mark.parametrize("name", HALF)
def test_half_precision_stalls_in_others_and_not_in_ours(name):
    theirs, ours, right = half_precision(name)
    assert ours == pytest.approx(right, rel=2e-6)
    if name.startswith("timm"):  # rounds stochastically
        assert np.mean(theirs) == pytest.approx(right, abs=0.005)
        assert np.std(theirs) > 0.01
    else:
        assert np.ptp(theirs) == 0
        assert abs(theirs[0] - right) > 0.05


def differences(name: str) -> tuple[float, float]:
    """Return differences over 60 updates in float64: theirs - rule, ours - theirs."""
    row, iterates = ROWS[name], random_walk()
    if name in NAMES:
        theirs = their_averages(peer_of(name), iterates, **row.arguments)
    else:
        iterates, theirs = run_lightning(LIGHTNING[name](**row.arguments))
    with enable_x64(True):
        ours = our_averages(row.ours(), iterates)
    rule = rule_averages(row.weights(), iterates)
    to_rule = largest_difference(theirs, rule)
    return to_rule, largest_difference(ours, theirs, row.since)


def report() -> Iterator[str]:
    """Yield the lines of numbers on the page."""
    yield "60 updates in float64, difference: theirs to the rule, ours to theirs"
    for name in dict.fromkeys([*NAMES, *LIGHTNING]):
        to_rule, to_theirs = differences(name)
        yield f"  {name:32} {to_rule:.1e} {to_theirs:.1e}"
    yield f"  {'torch, several tensors at once':32} {several_at_once():.1e}"
    yield "bfloat16: theirs, its spread, ours, right"
    for name in HALF:
        theirs, ours, right = half_precision(name)
        theirs = f"{np.mean(theirs):.4f} {np.std(theirs):.4f}"
        yield f"  {name:32} {theirs} {ours:.6f} {right:.6f}"
    yield f"mean age at width 0.1, over {SKIPPED} updates: theirs, ours"
    for k in (1, 10, 100):
        theirs, ours = look_back(skipping_peer(k)), look_back(skipping_ours(k))
        yield f"  {f'every {k}':32} {theirs:.3f} {ours:.3f}"


if __name__ == "__main__":
    for line in report():
        print(line)
