"""The choice of reverse step, against enumeration that shares no code with diffusion.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, save_checkpoint
from diffusion import DiscreteDiffusion
from model import UNet
from trajectories import respaced

FAMILIES = [("uniform", 2), ("uniform", 4), ("absorbing", 2), ("absorbing", 3), ("gaussian", 4)]
T = 16


class Table(torch.nn.Module):
    """A network for one pixel: logits by t and noisy state, float64 [T + 1, S, K]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, x_t, t):
        return self.logits[t][torch.arange(len(t)), x_t[:, 0, 0, 0]][:, :, None, None]


def posteriors(transition, K, seed=0):
    """A chain, p(x_0 | x_t) and the leave-one-out posterior, [T + 1, S, K], of a random p(x_0).

    Leaving out the only pixel leaves p(x_0).
    """
    d = DiscreteDiffusion(torch.nn.Identity(), K, T, transition, image_shape=(1, 1, 1))
    prior = np.random.default_rng(seed).dirichlet(np.ones(K))
    joint = d.bar_Q[:, :K].numpy().transpose(0, 2, 1) * prior  # [T + 1, S, K]
    mass = joint.sum(-1, keepdims=True)
    exact = np.divide(joint, mass, out=np.full_like(joint, 1 / K), where=mass > 0)
    return d, exact, np.broadcast_to(prior, joint.shape)


def with_network(d, probs, reverse, **changes):
    with np.errstate(divide="ignore"):
        network = Table(np.log(probs))
    return DiscreteDiffusion(network, **d.config | {"reverse": reverse} | changes)


def states(d, t):
    """All states reachable from a level at t, as one-pixel images, and t for each."""
    x_t = (d.bar_Q[t, : d.num_levels] > 0).any(0).nonzero()
    return x_t.view(-1, 1, 1, 1), torch.full((len(x_t),), t)


def equation_4(d, probs, t, x_t):
    """Proportional to the sum over x_0 of q(j | x_0) q(x_t | j) p~(x_0), state by state."""
    p = [
        sum(
            d.bar_Q[t - 1, k, j].item() * d.Q[t, j, x_t].item() * probs[k]
            for k in range(d.num_levels)
        )
        for j in range(d.num_states)
    ]
    return np.array(p) / sum(p)


@pytest.mark.parametrize("transition, K", FAMILIES)
def test_joint_form_is_equation_4(transition, K):
    """For t >= 2; at t = 1 it is the softmax of x_0, and 0 for states beyond the levels."""
    d, exact, _ = posteriors(transition, K)
    probs = np.random.default_rng(1).dirichlet(np.ones(K), exact.shape[:2])
    joint = with_network(d, probs, "joint")
    for t in range(1, T + 1):
        x_t, ts = states(d, t)
        p = joint.p_theta(x_t, ts)[:, :, 0, 0].numpy()
        for row, x in zip(p, x_t.flatten().tolist(), strict=True):
            plain = np.append(probs[1, x], np.zeros(d.num_states - K))
            wanted = plain if t == 1 else equation_4(d, probs[t, x], t, x)
            np.testing.assert_allclose(row, wanted, atol=1e-12)


@pytest.mark.parametrize("transition, K", FAMILIES)
def test_joint_form_of_the_leave_one_out_posterior_is_the_mixture_of_the_posterior(transition, K):
    """Also of a respaced chain, whose first timestep isn't the network's t = 1."""
    d, exact, leave_one_out = posteriors(transition, K)
    joint, mixture = with_network(d, leave_one_out, "joint"), with_network(d, exact, "mixture")
    for t in range(2, T + 1):
        np.testing.assert_allclose(
            joint.p_theta(*states(d, t)), mixture.p_theta(*states(d, t)), atol=1e-12
        )
    joint, mixture = respaced(joint, [2, 3, T]), respaced(mixture, [2, 3, T])
    assert joint.config["reverse"] == "joint"
    for t in (1, 2, 3):
        np.testing.assert_allclose(
            joint.p_theta(*states(joint, t)), mixture.p_theta(*states(joint, t)), atol=1e-12
        )


@pytest.mark.parametrize("transition, K", FAMILIES)
def test_the_forms_differ_where_the_likelihood_does(transition, K):
    """Given the posterior, the joint form counts the likelihood twice; harmless if absorbing."""
    d, exact, _ = posteriors(transition, K)
    joint, mixture = with_network(d, exact, "joint"), with_network(d, exact, "mixture")
    apart = max(
        (joint.p_theta(*states(d, t)) - mixture.p_theta(*states(d, t))).abs().max()
        for t in range(2, T + 1)
    )
    assert apart < 1e-12 if transition == "absorbing" else apart > 0.01


@pytest.mark.parametrize("reverse", ["mixture", "joint"])
@pytest.mark.parametrize("transition, K", FAMILIES)
def test_loss_bound_and_sampler_use_it(transition, K, reverse):
    """Each term of the bound by enumeration, the loss, and the distribution of samples."""
    d, exact, _ = posteriors(transition, K)
    probs = 0.8 * exact + 0.2 * np.random.default_rng(2).dirichlet(np.ones(K), exact.shape[:2])
    d = with_network(d, probs, reverse, loss_type="variational")
    bar_Q = d.bar_Q.numpy()

    def p_theta(t, x):
        """[S], for a reachable state."""
        if reverse == "joint":
            return (
                np.append(probs[1, x], np.zeros(d.num_states - K))
                if t == 1
                else equation_4(d, probs[t, x], t, x)
            )
        w = probs[t, x] * (bar_Q[t, :K, x] > 0)
        return sum(w[k] / w.sum() * equation_4(d, np.eye(K)[k], t, x) for k in range(K) if w[k])

    N, marginal = 2000, d.prior.numpy()
    for t in range(T, 0, -1):
        marginal = sum(
            marginal[x] * p_theta(t, x) for x in range(d.num_states) if bar_Q[t, :K, x].any()
        )
    for x_0 in range(K):
        terms = []
        for t, x in itertools.product(range(1, T + 1), range(d.num_states)):
            if bar_Q[t, x_0, x]:
                q, p = equation_4(d, np.eye(K)[x_0], t, x), p_theta(t, x)
                kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a)
                one = torch.tensor(x).view(1, 1, 1, 1)
                got = d.L_t_minus_1(torch.tensor(x_0).view(1, 1, 1, 1), one, torch.tensor([t]))
                assert got.item() == pytest.approx(kl, abs=1e-10)
                terms.append(bar_Q[t, x_0, x] * kl)
        images = torch.full((N, 1, 1, 1), x_0)
        torch.manual_seed(0)
        estimate = d.variational_bound(images) - d.L_T(images)
        assert estimate.mean().item() == pytest.approx(
            sum(terms), abs=5 * estimate.std().item() / N**0.5 + 1e-9
        )
        t, u = d.draw_t(N), torch.rand(images.shape)
        term = d.L_t_minus_1(images, d.q_sample(images, t, u), t).mean().item()
        assert d.loss(images, t, u).item() == pytest.approx(T * term, rel=1e-9)
    samples = d.sample(N, batch_size=N).flatten().long()
    np.testing.assert_allclose(samples.bincount(minlength=d.num_states) / N, marginal, atol=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_form_in_low_precision(dtype):
    """Finite and close to float64 even where likelihoods underflow in float32."""
    d = DiscreteDiffusion(torch.nn.Identity(), 64, 50, "gaussian", reverse="joint")
    torch.manual_seed(0)
    x_0 = torch.randint(0, 64, (8, 1, 8, 8))
    for spread, t in itertools.product((5, 100), (1, 2, 5, 50)):
        logits = (spread * torch.randn(8, 64, 8, 8)).to(dtype).requires_grad_()
        ts = torch.full((8,), t)
        x_t = d.q_sample(x_0, ts)
        p, exact = d.p_theta(x_t, ts, logits), d.p_theta(x_t, ts, logits.double())
        assert p.isfinite().all()
        np.testing.assert_allclose(p.detach().sum(1), 1, atol=1e-4)
        if spread == 5:  # beyond, the network is certain of impossible levels
            np.testing.assert_allclose(p.detach(), exact.detach(), atol=1e-5)
        assert torch.autograd.grad(p.clamp(min=1e-30).log().mean(), logits)[0].isfinite().all()


# -- the choice itself -----------------------------------------------------------------------------


def test_hybrid_weight_stands_beside_one_term_of_the_bound():
    """T (L_{t-1} / D + lambda CE), lambda = 0.001 by default: T times the authors' loss."""
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 8, 8).double()

    class Fixed(torch.nn.Module):
        def forward(self, x_t, t):
            return logits.expand(len(x_t), -1, -1, -1)

    x_0, t, u = (
        torch.randint(0, 2, (4, 1, 8, 8)),
        torch.tensor([1, 5, 9, 20]),
        torch.rand(4, 1, 8, 8),
    )
    for weight in (0.001, 0.3):
        changes = {} if weight == 0.001 else {"hybrid_weight": weight}
        d = DiscreteDiffusion(Fixed(), 2, 20, loss_type="hybrid", image_shape=(1, 8, 8), **changes)
        term = d.L_t_minus_1(x_0, d.q_sample(x_0, t, u), t).mean().item() / 64
        cross_entropy = -logits.log_softmax(1).expand(4, -1, -1, -1).gather(1, x_0).mean().item()
        assert d.loss(x_0, t, u).item() == pytest.approx(
            20 * (term + weight * cross_entropy), rel=1e-6
        )


def test_checkpoints_keep_the_choice_and_old_ones_are_mixtures(tmp_path):
    """Checkpoints older than the choice are mixtures, and their num_classes is num_levels."""
    model = UNet(channels=(8, 8, 8))
    d = DiscreteDiffusion(
        model, timesteps=20, loss_type="hybrid", reverse="joint", hybrid_weight=0.5
    )
    saved = {"network": model.config, "diffusion": d.config, "averaged_weights": model.state_dict()}
    save_checkpoint(tmp_path / "new.pth", saved)
    new = load_checkpoint(tmp_path / "new.pth", timesteps=5)
    assert (new.reverse, new.hybrid_weight) == ("joint", 0.5)
    old = {"num_classes": 2, "timesteps": 20, "transition": "uniform"}
    network = {key: value for key, value in model.config.items() if key != "output"}
    save_checkpoint(tmp_path / "old.pth", saved | {"network": network, "diffusion": old})
    old = load_checkpoint(tmp_path / "old.pth")
    assert (old.reverse, old.num_levels, old.model.output) == ("mixture", 2, "softmax")
