"""What the schedules do to a pixel: the fitted one is what its definition says, and the names hold."""

import math

import numpy as np
import pytest
import torch

from diffusion import DiscreteDiffusion
from experiments.noise import changed, mutual_information
from transitions import fitted_betas, gaussian_transitions, geometric_betas


def process(K, T, *names):
    return DiscreteDiffusion(torch.nn.Identity(), K, T, *names)


@pytest.mark.parametrize("K, T", [(2, 10), (8, 200), (256, 20)])
def test_mutual_information_falls_in_a_straight_line(K, T):
    """Of absorbing transitions with the schedule of that name. Others bend: the name is only a name there."""
    line = 1 - np.arange(T + 1) / T
    np.testing.assert_allclose(mutual_information(process(K, T, "absorbing", "mutual_info")), line, atol=1e-12)
    for names in (("absorbing", "cosine"), ("uniform", "mutual_info"), ("uniform", "cosine")):
        assert np.abs(mutual_information(process(K, T, *names)).numpy() - line).max() > 0.05


def test_mutual_information_by_hand():
    """Summed over joint and marginals, in plain Python, for a chain whose prior on x_t is not uniform."""
    d = process(4, 20, "gaussian")
    for t in (0, 1, 7, 20):
        q = d.bar_Q[t].tolist()
        marginal = [sum(row[j] for row in q) / 4 for j in range(4)]
        total = sum(q[i][j] / 4 * math.log2(q[i][j] / marginal[j]) for i in range(4) for j in range(4) if q[i][j])
        assert mutual_information(d)[t].item() == pytest.approx(total / 2, abs=1e-12)
        assert changed(d)[t].item() == pytest.approx(1 - sum(q[i][i] for i in range(4)) / 4, abs=1e-12)


def bisected(T, K):
    """The width at the end that brings the edge's row within 1e-4 of uniform, by products of the matrices."""
    first = 4 / ((K - 1) ** 2 * math.log(2 / 0.001))
    low, high = math.log(first), math.log(1e4)
    for _ in range(40):
        middle = (low + high) / 2
        row = torch.eye(K, dtype=torch.float64)[0]
        for Q in gaussian_transitions(K, torch.linspace(first, math.exp(middle), T, dtype=torch.float64)):
            row = row @ Q
        low, high = (middle, high) if (row - 1 / K).abs().sum() / 2 > 1e-4 else (low, middle)
    return torch.linspace(first, math.exp(high), T, dtype=torch.float64)


@pytest.mark.parametrize("K, T", [(3, 20), (4, 16), (8, 200), (33, 50), (256, 20)])
def test_fitted_widths(K, T):
    np.testing.assert_allclose(fitted_betas(T, K), bisected(T, K), rtol=1e-9, atol=0)


@pytest.mark.parametrize("K, T", [(3, 20), (8, 200), (64, 100)])
def test_geometric_widths(K, T):
    """From the same start to the same end as the fitted ones, in equal factors, so that x_t knows of x_0 for longer."""
    fitted, geometric = process(K, T, "gaussian", "fitted"), process(K, T, "gaussian", "geometric")
    betas = geometric_betas(T, K)
    assert betas[0].item() == pytest.approx(fitted_betas(T, K)[0].item(), rel=1e-12)
    np.testing.assert_allclose(betas[1:] / betas[:-1], (betas[-1] / betas[0]).item() ** (1 / (T - 1)), rtol=1e-9)
    for d in (fitted, geometric):
        assert (d.bar_Q[T, 0] - 1 / K).abs().sum().item() / 2 == pytest.approx(1e-4, rel=1e-3)
    half = [int((mutual_information(d) > 0.5).sum()) for d in (fitted, geometric)]
    assert half[1] > 1.5 * half[0]
