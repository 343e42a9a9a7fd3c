"""Schedules: the fitted one matches its definition, the others do what their names say."""

import math

import numpy as np
import pytest
import torch

from diffusion import DiscreteDiffusion
from experiments.figures import changed, mutual_information
from transitions import fitted_betas, gaussian_transitions, information_betas


def process(K, T, *names):
    return DiscreteDiffusion(torch.nn.Identity(), K, T, *names)


@pytest.mark.parametrize("K, T", [(2, 10), (8, 200), (256, 20)])
def test_mutual_information_falls_in_a_straight_line(K, T):
    """Only for absorbing transitions with the schedule of that name."""
    line = 1 - np.arange(T + 1) / T
    np.testing.assert_allclose(
        mutual_information(process(K, T, "absorbing", "mutual_info")), line, atol=1e-12
    )
    for names in (("absorbing", "cosine"), ("uniform", "mutual_info"), ("uniform", "cosine")):
        assert np.abs(mutual_information(process(K, T, *names)).numpy() - line).max() > 0.05


def test_mutual_information_by_hand():
    """In plain Python, for a chain with a non-uniform distribution of x_t."""
    d = process(4, 20, "gaussian")
    for t in (0, 1, 7, 20):
        q = d.bar_Q[t].tolist()
        marginal = [sum(row[j] for row in q) / 4 for j in range(4)]
        total = sum(
            q[i][j] / 4 * math.log2(q[i][j] / marginal[j])
            for i in range(4)
            for j in range(4)
            if q[i][j]
        )
        assert mutual_information(d)[t].item() == pytest.approx(total / 2, abs=1e-12)
        assert changed(d)[t].item() == pytest.approx(
            1 - sum(q[i][i] for i in range(4)) / 4, abs=1e-12
        )


def bisected(T, K):
    """The final width that brings the edge level's row within 1e-4 of uniform."""
    first = 4 / ((K - 1) ** 2 * math.log(2 / 0.001))
    low, high = math.log(first), math.log(1e4)
    for _ in range(40):
        middle = (low + high) / 2
        row = torch.eye(K, dtype=torch.float64)[0]
        for Q in gaussian_transitions(
            K, torch.linspace(first, math.exp(middle), T, dtype=torch.float64)
        ):
            row = row @ Q
        low, high = (middle, high) if (row - 1 / K).abs().sum() / 2 > 1e-4 else (low, middle)
    return torch.linspace(first, math.exp(high), T, dtype=torch.float64)


@pytest.mark.parametrize("K, T", [(3, 20), (4, 16), (8, 200), (33, 50), (256, 20)])
def test_fitted_widths(K, T):
    np.testing.assert_allclose(fitted_betas(T, K), bisected(T, K), rtol=1e-9, atol=0)


@pytest.mark.parametrize("K, T, tolerance", [(3, 60, 1e-3), (8, 200, 1e-4), (64, 100, 0.01)])
def test_information_of_gaussian_transitions_falls_as_a_squared_cosine(K, T, tolerance):
    """And is gone at T; evenly spaced widths lose half of it in the first quarter."""
    d = process(K, T, "gaussian", "cosine")
    expected = np.cos(np.pi / 2 * np.minimum(1, np.arange(T + 1) / (T - 12))) ** 2
    np.testing.assert_allclose(mutual_information(d), expected, atol=tolerance)
    assert (d.bar_Q[T] - 1 / K).abs().sum(1).max() / 2 < 1e-4
    assert information_betas(T, K)[-12:].tolist() == pytest.approx([1e4] * 12)
    assert mutual_information(process(K, T, "gaussian", "fitted"))[T // 4] < 0.5
