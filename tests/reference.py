# SPDX-License-Identifier: Apache-2.0
"""The methods in plain float64 NumPy, written from their equations."""

import math

import numpy as np


def asgd_step(
    p,
    g,
    ax,
    step,
    *,
    learning_rate=1e-2,
    lambd=1e-4,
    alpha=0.75,
    t0=1e6,
    weight_decay=0,
):
    """Return params, average and step after one update of `torch.optim.ASGD`."""
    eta, mu = asgd_schedules(
        step, learning_rate=learning_rate, lambd=lambd, alpha=alpha, t0=t0
    )
    p = (1 - lambd * eta) * p - eta * (g + weight_decay * p)
    ax = p if mu == 1 else ax + mu * (p - ax)
    return p, ax, step + 1


def asgd_schedules(step, *, learning_rate=1e-2, lambd=1e-4, alpha=0.75, t0=1e6):
    """Return the step size and the next iterate's weight after `step` updates."""
    lr = learning_rate(step) if callable(learning_rate) else learning_rate
    eta = lr / (1 + lambd * lr * step) ** alpha
    mu = 1 / max(1, step - t0)
    return np.float64(eta), np.float64(mu)


def asgd(params, gradients, **hyperparameters):
    """Yield (params, average, step) after each gradient of the sequence."""
    p, ax, step = params, params, 0
    for g in gradients:
        p, ax, step = asgd_step(p, g, ax, step, **hyperparameters)
        yield p, ax, step


def nt_asgd(params, gradients, losses, *, nonmono, learning_rate, **hyperparameters):
    """Yield (params, average, triggered) after each gradient of the sequence.

    `losses` are the validation losses passed to the updates, or None.
    """
    p, ax, since, earlier = params, params, None, []
    for n, (g, loss) in enumerate(zip(gradients, losses, strict=True)):
        if loss is not None:
            if len(earlier) > nonmono and loss > min(earlier[:-nonmono]):
                since = 0 if since is None else since
            earlier.append(loss)
        lr = learning_rate(n) if callable(learning_rate) else learning_rate
        if since is None:
            decay = hyperparameters.get("weight_decay", 0)
            p = ax = p - lr * (g + decay * p)
        else:
            p, ax, since = asgd_step(
                p, g, ax, since, learning_rate=lr, t0=0, **hyperparameters
            )
        yield p, ax, since is not None


def average_iterates(iterates, weighting, parameter=None, start=0, every=1):
    """Yield the average after each iterate, as a sum over the stored iterates."""
    for step in range(1, len(iterates) + 1):
        count = 0 if step < start else int((step - start) // every)
        if count == 0:  # the average equals the iterate until the first averaged one
            yield iterates[step - 1]
            continue
        steps = int(start) + every * np.arange(1, count + 1)
        shares = weighting_shares(weighting, parameter, count)
        yield np.average(np.asarray(iterates)[steps - 1], axis=0, weights=shares)


def weighting_shares(weighting, parameter, count):
    """Return the final weights of `count` averaged iterates, up to a factor."""
    n = range(1, count + 1)
    if weighting == "uniform":
        return [1.0 for _ in n]
    if weighting == "polynomial":  # n^gamma as a rising factorial
        return [math.exp(math.lgamma(k + parameter) - math.lgamma(k)) for k in n]
    return [parameter ** (count - k) for k in n]


def average_shares(weight, step, start=0, every=1, include_start=False):
    """Return the weights of p(0), …, p(step) in the average after `step` updates."""
    shares, n = np.zeros(step + 1), 0
    for t in range(step + 1):
        since = t - start
        if include_start and since == 0:
            n, w = 1, 1.0
        elif since >= every and since % every == 0:
            n += 1
            w = weight(n)
        else:  # the average equals the iterate, or keeps its value once begun
            w = 0.0 if n else 1.0
        shares *= 1 - w
        shares[t] += w
    return shares


def random_scaling(iterates):
    """Return the mean of the iterates and the diagonal of V_n, by its definition."""
    n = len(iterates)
    steps = np.arange(1, n + 1).reshape(-1, *[1] * (np.ndim(iterates) - 1))
    averages = np.cumsum(np.asarray(iterates, np.float64), axis=0) / steps
    squares = steps.astype(np.float64) ** 2 * (averages - averages[-1]) ** 2
    return averages[-1], squares.sum(axis=0) / n**2
