"""Confident networks: loss, bound and gradients stay finite and correct, against numpy."""

import itertools

import numpy as np
import pytest
import torch
from chains import LEGAL

from diffusion import LOSSES, REVERSES, DiscreteDiffusion
from transitions import log_matmul

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")

T = 20
SIDE = (1, 1, 6)
CHAINS = [*LEGAL, ("uniform", "cosine", 32), ("absorbing", "mutual_info", 32)]


class Logits(torch.nn.Module):
    """A network whose logits are a parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x_t, t):
        return self.logits


def log_softmax(x):
    return x - np.logaddexp.reduce(x, keepdims=True)


def reference(d, x_t, t, logits, reverse):
    """log p_theta(x_{t-1} | x_t) of one pixel, [S], from the logits [K], term by term."""
    K, S = d.num_levels, d.num_states
    with np.errstate(divide="ignore"):
        log_Q, log_bar_Q = np.log(d.Q[t].numpy()), np.log(d.bar_Q.numpy())
    likelihood = log_bar_Q[t, :K, x_t]
    levels = [k for k in range(K) if likelihood[k] > -np.inf]
    if reverse == "joint" and t == 1:
        return np.append(log_softmax(logits), np.full(S - K, -np.inf))
    w = log_softmax(logits[levels] + (likelihood[levels] if reverse == "joint" else 0))
    terms = [
        log_Q[:, x_t] + log_bar_Q[t - 1, k] - likelihood[k] + log_w
        for k, log_w in zip(levels, w, strict=True)
    ]
    return np.logaddexp.reduce(terms, axis=0)


@pytest.mark.parametrize("reverse", REVERSES)
@pytest.mark.parametrize("transition, schedule, K", CHAINS)
def test_p_theta_of_a_sure_network(transition, schedule, K, reverse):
    """Logits of +-1e4 in every precision match numpy's log-probabilities, zeros included."""
    names = {"transition": transition, "schedule": schedule, "reverse": reverse}
    d = DiscreteDiffusion(torch.nn.Identity(), K, T, image_shape=SIDE, **names)
    rng = np.random.default_rng(0)
    for t in (1, 2, 10, T):
        logits = rng.choice([-1e4, -60.0, 0.0, 60.0, 1e4], size=(4, K, 1, 6))
        x_0 = torch.from_numpy(rng.integers(0, K, (4, 1, 1, 6)))
        x_t, time = d.q_sample(x_0, torch.full((4,), t)), torch.full((4,), t)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            given = torch.from_numpy(logits).to(dtype)
            log_p = d.log_p_theta(x_t, time, given).double().numpy()
            assert not np.isnan(log_p).any()
            for b, i in itertools.product(range(4), range(6)):
                exact = given[b, :, 0, i].double().numpy()
                expected = reference(d, x_t[b, 0, 0, i].item(), t, exact, reverse)
                rounding = {torch.float64: 1e-9}.get(dtype, 1e-6)
                got = log_p[b, :, 0, i]
                assert ((got == -np.inf) == (expected == -np.inf)).all()
                finite = expected > -np.inf
                np.testing.assert_allclose(
                    got[finite], expected[finite], rtol=rounding, atol=200 * rounding
                )
            np.testing.assert_allclose(np.exp(log_p).sum(1), 1, atol=1e-4)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("reverse", REVERSES)
@pytest.mark.parametrize("transition, schedule, K", CHAINS)
def test_losses_of_a_sure_network(transition, schedule, K, reverse, loss_type):
    """Values and gradients in float32 and half precision are finite and match float64."""
    torch.manual_seed(0)
    x_0 = torch.randint(0, K, (4, *SIDE))
    u = torch.rand(x_0.shape)
    logits = 1e4 * torch.randn(4, K, *SIDE[1:]).sign()
    names = {"transition": transition, "schedule": schedule, "reverse": reverse}
    for t in (1, 2, 10, T):
        results = {}
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            network = Logits(logits.to(dtype))
            d = DiscreteDiffusion(network, K, T, loss_type=loss_type, image_shape=SIDE, **names)
            loss = d.loss(x_0, torch.full((4,), t), u)
            assert loss.isfinite()
            (gradient,) = torch.autograd.grad(loss, network.logits)
            assert gradient.isfinite().all()
            results[dtype] = loss.item(), gradient
        exact, gradient = results.pop(torch.float64)
        for dtype, (value, other) in results.items():
            half = dtype != torch.float32
            assert value == pytest.approx(exact, rel=0.01 if half else 1e-5, abs=1e-4)
            torch.testing.assert_close(
                other.double(), gradient, rtol=0.02 if half else 1e-4, atol=0.02 if half else 1e-4
            )


@pytest.mark.parametrize("wrong_by", [95, 110, 1e4])
def test_the_loss_of_a_pixel_that_is_wrong(wrong_by):
    """At t = 1 a pixel costs -log p~, with the gradient (-1, 1) / D."""
    network = Logits(torch.tensor([0.0, wrong_by]).view(1, 2, 1, 1))
    shape = (1, 1, 1)
    d = DiscreteDiffusion(network, timesteps=1, loss_type="variational", image_shape=shape)
    x = torch.zeros(1, *shape, dtype=torch.long)
    loss = d.loss(x, torch.tensor([1]), torch.zeros(1, *shape))
    loss.backward()
    assert loss.item() == pytest.approx(wrong_by)
    assert network.logits.grad.flatten().tolist() == pytest.approx([-1, 1])


def test_an_unmasked_pixel_is_certain_whatever_the_network_says():
    """With absorbing transitions x_t = 0 was always 0, so p_theta is certain."""
    d = DiscreteDiffusion(torch.nn.Identity(), 2, 10, "absorbing", image_shape=(1, 1, 1))
    x_t, logits = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.tensor([0.0, 120.0])
    for t in range(1, 11):
        if d.bar_Q[t, 0, 0] > 0:
            p = d.p_theta(x_t, torch.tensor([t]), logits.view(1, 2, 1, 1))
            assert p.flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-6)
            assert p.flatten().tolist()[1:] == [0, 0]


@pytest.mark.parametrize("transition", ["uniform", "absorbing", "gaussian"])
@pytest.mark.parametrize("reverse", REVERSES)
def test_256_levels_of_a_sure_network(transition, reverse):
    """More than 16 levels are summed differently: still finite, with finite gradients."""
    torch.manual_seed(0)
    network = Logits(1e4 * torch.randn(2, 256, 4, 4))
    d = DiscreteDiffusion(
        network, 256, T, transition, loss_type="variational", reverse=reverse, image_shape=(1, 4, 4)
    )
    x_0 = torch.randint(0, 256, (2, 1, 4, 4))
    for t in (1, 2, 10, T):
        loss = d.loss(x_0, torch.full((2,), t))
        assert loss.isfinite()
        assert torch.autograd.grad(loss, network.logits)[0].isfinite().all()


def test_log_matmul_of_many_is_that_of_few(monkeypatch):
    """Both algorithms give numpy's sums, and -inf where every term is zero."""
    rng = np.random.default_rng(0)
    M = rng.random((3, 20, 21)) * (rng.random((3, 20, 21)) < 0.5)
    M[:, :, 7] = 0
    a = rng.normal(size=(3, 20, 2, 2)) * 30
    with np.errstate(divide="ignore"):
        log_M = np.log(M)
        terms = a[:, :, None] + log_M[..., None, None]
    expected = np.logaddexp.reduce(terms, axis=1)
    for K in (4, 20):
        got = log_matmul(torch.from_numpy(a[:, :K]), torch.from_numpy(log_M[:, :K]))
        want = expected if K == 20 else np.logaddexp.reduce(terms[:, :K], axis=1)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
        assert (got[:, 7] == -np.inf).all()
