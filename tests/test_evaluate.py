"""What evaluate.py computes, against closed forms and brute force."""

import math

import pytest
import torch

from diffusion import DiscreteDiffusion
from evaluate import bound_terms, frechet_distance, nearest_digits, share_within, summarize_bound
from model import UNet


def test_frechet_distance_of_gaussians():
    """Known means and covariances, built exactly: |difference of means|^2 + (sum over axes of (s_a - s_b)^2)."""
    torch.manual_seed(0)
    raw = torch.randn(5000, 6, dtype=torch.float64)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T  # covariance exactly the identity
    s_a, s_b = torch.arange(1, 7, dtype=torch.float64), torch.tensor([2.0, 2, 2, 5, 5, 5], dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    shift = torch.arange(6, dtype=torch.float64)
    expected = (shift.square().sum() + (s_a - s_b).square().sum()).item()
    assert frechet_distance(white * s_a @ turn, (white * s_b + shift) @ turn) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)


def test_coverage_by_hand():
    """Reference 0, 1, 3, 7 on a line with k = 2: radii 3, 2, 3, 6."""
    reference = torch.tensor([[0.0], [1], [3], [7]], dtype=torch.float64)
    points = torch.tensor([[-3.0], [-3.5], [13], [13.5]], dtype=torch.float64)
    assert share_within(points, reference, k=2) == 0.5
    assert share_within(reference, reference, k=2) == 1


def test_nearest_digits_by_hand():
    train = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    train[1] = 1
    train[2, 0, 0] = 1
    sample = torch.tensor([[[[1, 0], [1, 1]]]], dtype=torch.uint8)
    rows, least = nearest_digits(sample, train, k=3)
    assert least.tolist() == [1]
    assert torch.equal(rows, torch.stack([sample[0], train[1], train[0], train[2]])) or torch.equal(
        rows, torch.stack([sample[0], train[1], train[2], train[0]])
    )


@pytest.mark.parametrize("transition", ["uniform", "absorbing"])
def test_bound_estimate_agrees_with_all_terms(transition):
    """The Monte Carlo estimate is unbiased: over many repeats it meets the sum over every t, and so do its parts."""
    torch.manual_seed(0)
    states = 3 if transition == "absorbing" else 2
    network = UNet(2, states, channels=(8, 8, 8)).eval()
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    d = DiscreteDiffusion(network, timesteps=12, transition=transition)
    x_0 = torch.randint(0, 2, (1, 1, 8, 8)).expand(400, 1, 8, 8)
    exact = bound_terms(d, x_0, None, "cpu")
    for key in ("L_T", "L_t_minus_1", "L_0"):
        assert exact[key].shape == (400,)
    total = summarize_bound(exact)["nats_per_image"]
    direct = d.variational_bound(x_0, None, torch.Generator().manual_seed(3)).double()
    error = direct.std().item() / 20
    assert abs(total - direct.mean().item()) < 5 * error
    for repeats in (1, 4):
        report = summarize_bound(bound_terms(d, x_0, repeats, "cpu"))
        assert abs(report["nats_per_image"] - total) < 4 * (report["standard_error"] + error)
        parts = report["L_T"] + report["sum_L_t_minus_1"] + report["L_0"]
        assert report["nats_per_image"] == pytest.approx(parts)
        assert report["bits_per_dimension"] == pytest.approx(report["nats_per_image"] / 784 / math.log(2))


def test_bound_of_several_binarizations_by_hand():
    """Two images, three binarizations: totals [1, 3], [2, 6], [3, 9], whose means over binarizations are 2 and 6."""
    L_t_minus_1 = torch.tensor([[1, 3], [1.5, 5], [3, 9]], dtype=torch.float64)
    L_0 = torch.tensor([[0, 0], [0.5, 1], [0, 0]], dtype=torch.float64)
    draws = [{"L_T": torch.zeros(2), "L_t_minus_1": a, "L_0": b} for a, b in zip(L_t_minus_1, L_0, strict=True)]
    summary = summarize_bound(*draws)
    assert summary["nats_per_image"] == pytest.approx(4)
    assert summary["standard_error"] == pytest.approx(2)  # of 2 and 6: sqrt(8) / sqrt(2)
    assert summary["standard_error_over_binarizations"] == pytest.approx(2 / math.sqrt(3))  # of 2, 4 and 6
    assert summary["sum_L_t_minus_1"] + summary["L_0"] == pytest.approx(4) and summary["L_0"] == pytest.approx(0.25)
