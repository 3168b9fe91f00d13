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
    """One update of `torch.optim.ASGD`: the new params, average and step."""
    eta, mu = asgd_schedules(
        step, learning_rate=learning_rate, lambd=lambd, alpha=alpha, t0=t0
    )
    p = (1 - lambd * eta) * p - eta * (g + weight_decay * p)
    ax = p if mu == 1 else ax + mu * (p - ax)
    return p, ax, step + 1


def asgd_schedules(step, *, learning_rate=1e-2, lambd=1e-4, alpha=0.75, t0=1e6):
    """The step size and the weight of the next iterate after `step` updates."""
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    eta = rate / (1 + lambd * rate * step) ** alpha
    mu = 1 / max(1, step - t0)
    return np.float64(eta), np.float64(mu)


def asgd(params, gradients, **hyperparameters):
    """Yields (params, average, step) after each gradient of the sequence."""
    p, ax, step = params, params, 0
    for g in gradients:
        p, ax, step = asgd_step(p, g, ax, step, **hyperparameters)
        yield p, ax, step


def nt_asgd(params, gradients, losses, *, nonmono, learning_rate, **hyperparameters):
    """Yields (params, average, triggered) after each gradient of the sequence.

    `losses` are those given to the updates, None for none.
    """
    p, ax, since, earlier = params, params, None, []
    for n, (g, loss) in enumerate(zip(gradients, losses, strict=True)):
        if loss is not None:
            if len(earlier) > nonmono and loss > min(earlier[:-nonmono]):
                since = 0 if since is None else since
            earlier.append(loss)
        rate = learning_rate(n) if callable(learning_rate) else learning_rate
        if since is None:
            decay = hyperparameters.get("weight_decay", 0)
            p = ax = p - rate * (g + decay * p)
        else:
            p, ax, since = asgd_step(
                p, g, ax, since, learning_rate=rate, t0=0, **hyperparameters
            )
        yield p, ax, since is not None


def average_iterates(iterates, weighting, parameter=None, start=0, every=1):
    """Yields the average after each iterate, as a sum over those stored."""
    for step in range(1, len(iterates) + 1):
        count = 0 if step < start else int((step - start) // every)
        if count == 0:  # until the first averaged iterate the average follows
            yield iterates[step - 1]
            continue
        steps = int(start) + every * np.arange(1, count + 1)
        shares = weighting_shares(weighting, parameter, count)
        yield np.average(np.asarray(iterates)[steps - 1], axis=0, weights=shares)


def weighting_shares(weighting, parameter, count):
    """What each of `count` averaged iterates counts in the end, up to a factor."""
    n = range(1, count + 1)
    if weighting == "uniform":
        return [1.0 for _ in n]
    if weighting == "polynomial":  # n^gamma as a rising factorial
        return [math.exp(math.lgamma(k + parameter) - math.lgamma(k)) for k in n]
    return [parameter ** (count - k) for k in n]


def average_shares(weight, step, start=0, every=1, include_start=False):
    """What each of p(0), …, p(step) counts in the average after `step` updates."""
    shares, n = np.zeros(step + 1), 0
    for t in range(step + 1):
        since = t - start
        if include_start and since == 0:
            n, w = 1, 1.0
        elif since >= every and since % every == 0:
            n += 1
            w = weight(n)
        else:  # followed until the first averaged iterate, held from then on
            w = 0.0 if n else 1.0
        shares *= 1 - w
        shares[t] += w
    return shares


def random_scaling(iterates):
    """The mean of the iterates, and the diagonal of V_n as its definition has it."""
    n = len(iterates)
    steps = np.arange(1, n + 1).reshape(-1, *[1] * (np.ndim(iterates) - 1))
    averages = np.cumsum(np.asarray(iterates, np.float64), axis=0) / steps
    squares = steps.astype(np.float64) ** 2 * (averages - averages[-1]) ** 2
    return averages[-1], squares.sum(axis=0) / n**2
