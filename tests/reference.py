# SPDX-License-Identifier: Apache-2.0
"""The methods in plain float64 NumPy, written from their equations."""

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
