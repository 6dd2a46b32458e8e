"""Nadam in NumPy, from the formulas alone: the oracle of the tests and of ``benchmarks/precision.py``.

Plain, slow and in double precision (or in ``np.longdouble``, where arrays of it are passed). It shares nothing
with the package.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

RULES: tuple[Any, ...] = ("scheduled", "constant", "simplified", "dozat2016")
FURTHER_RULES = ("adam", "torch1", "loss_scaled", "eps_hat", "undebiased", "flux")
CONSTANT_MOMENTUM = ("constant", "simplified", "adam", "eps_hat", "undebiased", "flux")


@dataclass(frozen=True)
class Nadam:
    """The hyperparameters of one variant."""

    rule: str = "scheduled"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    eps_root: float = 0.0
    momentum_decay: float = 4e-3
    power: float = 0.5

    def mu(self, t):
        """Momentum at step t."""
        if self.rule in CONSTANT_MOMENTUM:
            return self.b1 + 0.0 * t
        return self.b1 * (1 - 0.5 * 0.96 ** (self.momentum_decay * t))

    def mu_product(self, t):
        """The product of mu_1 to mu_t; it has long vanished after 10^5 steps."""
        return np.prod(self.mu(np.arange(1, min(t, 100_000) + 1, dtype=np.longdouble)))

    def step(self, g, m, v, t, mu_product):
        """Step t: the update, the new moments and the new product, from those of step t - 1."""
        product = self.mu(t) if self.rule == "loss_scaled" else mu_product * self.mu(t)
        m, v = self.moments(g, m, v, t)
        return self.update(g, m, v, t, product), m, v, product

    def moments(self, g, m, v, t):
        """The moments of step t, from those of step t - 1."""
        a = self.mu(t) if self.rule == "dozat2016" else self.b1
        return a * m + (1 - a) * g, self.b2 * v + (1 - self.b2) * np.abs(g) ** 2

    def update(self, g, m, v, t, product):
        """The update of step t, from the moments of that step and the product of the momenta up to it."""
        b2, mu, mu_next = self.b2, self.mu(t), self.mu(t + 1)
        v_debias = _one_minus_power(b2, t)
        g_hat = g / (1 - product)
        v_hat = v / v_debias
        eps = self.eps
        if self.rule in ("simplified", "adam", "eps_hat"):
            m_hat = m / (1 - product)
        elif self.rule == "torch1":
            m_hat = m / (1 - product * mu * mu_next)
        else:
            m_hat = m / (1 - product * mu_next)
        if self.rule in ("dozat2016", "flux"):
            v_hat = b2 * v_hat
        if self.rule == "eps_hat":
            eps = eps / np.sqrt(v_debias)
        if self.rule == "undebiased":
            g_hat, m_hat, v_hat = g, m, v
        m_bar = m_hat if self.rule == "adam" else (1 - mu) * g_hat + mu_next * m_hat
        return m_bar / ((v_hat + self.eps_root) ** self.power + eps)

    def updates(self, grads):
        """The updates of all steps from zero moments, and the last m, v and product of the momenta."""
        number = grads.real.dtype.type
        m, v, product, out = 0 * grads[0], 0 * np.abs(grads[0]), number(1), []
        for t, g in enumerate(grads, start=1):
            u, m, v, product = self.step(g, m, v, number(t), product)
            out.append(u)
        return np.stack(out), m, v, product

    def history(self, grads):
        """The updates, the moments and the products of all steps; of a million in seconds.

        Only the moments are computed step by step; all else depends on the step alone.
        """
        m, v = np.empty_like(grads), np.empty_like(grads)
        before = 0 * grads[0], 0 * grads[0]
        for i, g in enumerate(grads):
            m[i], v[i] = before = self.moments(g, *before, i + 1)
        t = np.arange(1, len(grads) + 1).reshape(-1, *[1] * (grads.ndim - 1))
        product = self.mu(t) if self.rule == "loss_scaled" else np.cumprod(self.mu(t), axis=0)
        return self.update(grads, m, v, t, product), m, v, product.ravel()


def _one_minus_power(b, t):
    return -np.expm1(t * np.log1p(np.longdouble(b) - 1)) if b else 1.0
