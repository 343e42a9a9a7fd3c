"""The bound and the losses against likelihoods of whole chains, by enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from chains import (
    LEGAL,
    Constant,
    ExactChain,
    Labelled,
    RandomNetwork,
    brute_force_posterior,
    make,
    seeded,
)
from enumeration import fits

from diffusion import LOSSES, BoundTerms
from transitions import gaussian_transitions, kl

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


# -- the bound of an imperfect network, against the likelihood of its whole chain ------------------


@pytest.mark.parametrize("transition, schedule, K", [c for c in LEGAL if c[2] < 5])
def test_bound_and_losses_against_all_trajectories(transition, schedule, K):
    """The bound is E_q log q(x_1..x_T | x_0) / p(x_0..x_T), summed over every trajectory.

    The losses, averaged over every t and x_t, are the bound without L_T, the cross-entropy, and
    their weighted sum.
    """
    T, S = 3, K + (transition == "absorbing")
    network = RandomNetwork(K, S, T)
    kwargs = {"model": network, "image_shape": (1, 1, 2)}
    names = {"transition": transition, "schedule": schedule}
    if transition == "gaussian":  # three steps can't reach noise, so take wide kernels
        steps = gaussian_transitions(K, torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
        names = {"Q": torch.cat([torch.eye(K, dtype=torch.float64)[None], steps])}
    kwargs |= names
    d = make(K, T, **kwargs)
    states = list(itertools.product(range(S), repeat=2))
    N = len(states)
    x = torch.tensor(states).view(N, 1, 1, 2)
    step = [
        np.array([[np.prod([d.Q[t, a[i], b[i]] for i in (0, 1)]) for b in states] for a in states])
        for t in range(T + 1)
    ]
    back = [np.zeros((N, N))]  # back[t][x_t, x_{t-1}]
    for t in range(1, T + 1):
        possible = d.bar_Q[t, :K].numpy().max(0) > 0  # states reachable from some level
        x_t_possible = [n for n in range(N) if possible[list(states[n])].all()]
        p = d.p_theta(x[x_t_possible], torch.full((len(x_t_possible),), t))[:, :, 0].numpy()
        kernel = np.zeros((N, N))
        kernel[x_t_possible] = [[row[b[0], 0] * row[b[1], 1] for b in states] for row in p]
        back.append(kernel)
    prior = np.array([np.prod([d.prior[s] for s in state]) for state in states])
    likelihood = prior
    for t in range(T, 0, -1):
        likelihood = likelihood @ back[t]

    trained = {name: make(K, T, loss_type=name, hybrid_weight=0.3, **kwargs) for name in LOSSES}
    for start in (n for n in range(N) if max(states[n]) < K):
        bound = 0.0
        for path in itertools.product(range(N), repeat=T):
            walk = (start, *path)
            q = np.prod([step[t][walk[t - 1], walk[t]] for t in range(1, T + 1)])
            if q > 0:
                p = prior[walk[-1]] * np.prod(
                    [back[t][walk[t], walk[t - 1]] for t in range(1, T + 1)]
                )
                bound += q * np.log(q / p)
        assert bound >= -np.log(likelihood[start]) - 1e-12

        terms, cross_entropy = 0.0, 0.0
        mean_loss = dict.fromkeys(LOSSES, 0.0)
        for t, n in itertools.product(range(1, T + 1), range(N)):
            weight = np.prod(
                [d.bar_Q[t, a, b] for a, b in zip(states[start], states[n], strict=True)]
            )
            if weight == 0:
                continue
            x_0, x_t, time = x[[start]], x[[n]], torch.tensor([t])
            terms += weight * d.L_t_minus_1(x_0, x_t, time).item()
            scores = network(x_t, time)[0, :, 0].numpy()
            log_probs = scores - np.log(np.exp(scores).sum(0))
            cross_entropy -= weight / T * np.mean([log_probs[states[start][i], i] for i in (0, 1)])
            for name, one in trained.items():
                one.q_sample = lambda *_, x_t=x_t: x_t
                mean_loss[name] += weight / T * one.loss(x_0, time).item()
        assert d.L_T(x[[start]]).item() + terms == pytest.approx(bound, abs=1e-9)
        assert mean_loss["variational"] == pytest.approx(terms / 2, abs=1e-9)
        assert mean_loss["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-9)
        assert mean_loss["hybrid"] == pytest.approx(terms / 2 + T * 0.3 * cross_entropy, abs=1e-9)


# -- the bound as it is called in practice ---------------------------------------------------------


class Fixed(torch.nn.Module):
    """float32 logits that depend only on t; `asked` records the inputs."""

    def __init__(self, K, T):
        super().__init__()
        self.table, self.asked = 3 * torch.randn(T + 1, K, generator=seeded(1)), []

    def forward(self, x_t, t):
        self.asked.append((x_t, t))
        return self.table[t][:, :, None, None].expand(-1, -1, *x_t.shape[2:])


@pytest.mark.parametrize("num_t", [None, 4])
@pytest.mark.parametrize(
    "transition, schedule, K, T", [("uniform", "linear", 2, 1000), ("absorbing", None, 3, 20)]
)
def test_bound_terms_are_the_float64_sums_at_the_noise_that_was_drawn(
    transition, schedule, K, T, num_t
):
    """KL(q || p) of every pixel by Bayes' rule in float64, at the (x_t, t) that the network saw."""
    network = Fixed(K, T)
    d = make(K, T, schedule, network, transition=transition, image_shape=(1, 4, 8))
    x_0 = torch.randint(0, K, (3, 1, 4, 8), generator=seeded(2))
    bound = d.bound_terms(x_0, num_t, seeded(3), batch_size=2)
    assert isinstance(bound, BoundTerms) and bound.terms.dtype == bound.total.dtype == torch.float64
    assert bound.t.shape == bound.terms.shape == (3, T if num_t is None else 5)
    if num_t is None:
        assert bound.t.tolist() == [list(range(1, T + 1))] * 3

    Q, bar_Q, kl = d.Q.numpy(), d.bar_Q.numpy(), {}

    def divergence(t, x_t, x_0):
        if (t, x_t, x_0) not in kl:
            w = np.exp(network.table[t].double().numpy())
            q, p = (
                brute_force_posterior(Q, bar_Q, t, x_t, v) for v in (np.eye(K)[x_0], w / w.sum())
            )
            kl[t, x_t, x_0] = (q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum()
        return kl[t, x_t, x_0]

    asked = iter(network.asked)
    for rows in ([0, 1], [2]):
        for k in range(bound.t.shape[1]):
            x_t, t = next(asked)
            assert torch.equal(t, bound.t[rows, k])
            for row, noisy in zip(rows, x_t, strict=True):
                pixels = zip(noisy.flatten().tolist(), x_0[row].flatten().tolist(), strict=True)
                expected = sum(divergence(bound.t[row, k].item(), *pixel) for pixel in pixels)
                assert bound.terms[row, k].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        prior = bar_Q[T, :K].mean(0)
        L_T = np.nansum(bar_Q[T, :K] * np.log(bar_Q[T, :K] / prior), axis=1)[x_0.numpy()].sum(
            (1, 2, 3)
        )
    np.testing.assert_allclose(bound.L_T, L_T, rtol=1e-9, atol=1e-12)
    assert torch.equal(bound.L_0, bound.terms[:, 0])
    weight = 1 if num_t is None else (T - 1) / 4
    np.testing.assert_allclose(bound.L_t_minus_1, weight * bound.terms[:, 1:].sum(1), rtol=1e-12)


@pytest.mark.parametrize("num_t", [None, 1, 3])
def test_variational_bound_is_unbiased(num_t):
    """Each part is within 4 standard errors of the enumerated mean, and L_T is exact.

    The chain stops short of noise, so L_T > 0.
    """
    Q = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).repeat(9, 1, 1)
    Q[0] = torch.eye(2)
    chain = ExactChain("pixel", 2, T=8, Q=Q)
    n = 20_000
    x_0 = torch.zeros(n, 1, 1, 1, dtype=torch.long)
    x_0[: n // 10] = 1  # exactly P(x_0 = 1) = 0.1
    bound = chain.d.bound_terms(x_0, num_t, seeded())
    L_T, L_t_minus_1, L_0 = chain.mean_terms()
    assert L_T > 0.01
    assert bound.L_T.mean().item() == pytest.approx(L_T, abs=1e-12)
    for estimate, expected in ((bound.L_t_minus_1, L_t_minus_1), (bound.L_0, L_0)):
        error = (
            (estimate[: n // 10].var() * 0.1 / n + estimate[n // 10 :].var() * 0.9 / n)
            .sqrt()
            .item()
        )
        assert abs(estimate.mean().item() - expected) < 4 * error
    whole = chain.d.variational_bound(x_0, num_t, seeded())
    assert whole.shape == (n,) and whole.dtype == torch.float64
    assert torch.equal(whole, bound.L_T + bound.L_t_minus_1 + bound.L_0)


@pytest.mark.parametrize("T, N, num_t", [(11, 20, 3), (11, 20, 1), (1000, 37, 27), (2, 3, 2)])
def test_bound_terms_spread_t_evenly(T, N, num_t):
    """If the draws can cover 2..T equally, they do, so the terms are weighted correctly."""
    d = make(2, T, model=Fixed(2, T), image_shape=(1, 2, 2))
    x_0 = torch.randint(0, 2, (N, 1, 2, 2), generator=seeded(1))
    bound = d.bound_terms(x_0, num_t, seeded(4))
    assert bound.t.shape == (N, 1 + num_t) and (bound.t[:, 0] == 1).all()
    counts = torch.bincount(bound.t[:, 1:].flatten(), minlength=T + 1)
    assert (
        len(counts) == T + 1
        and (counts[:2] == 0).all()
        and (counts[2:] == N * num_t // (T - 1)).all()
    )
    by_t = torch.zeros(T + 1, dtype=torch.float64).index_add_(
        0, bound.t[:, 1:].flatten(), bound.terms[:, 1:].flatten()
    )
    assert bound.L_t_minus_1.mean().item() == pytest.approx(
        (by_t[2:] / counts[2:]).sum().item(), rel=1e-9
    )


def test_every_image_sees_every_t():
    """Each image's t is uniform on 2..T, one in each of num_t equal parts."""
    d, x_0 = make(2, 13, image_shape=(1, 1, 1)), torch.zeros(4, 1, 1, 1, dtype=torch.long)
    generator = seeded()
    t = torch.stack([d.bound_terms(x_0, 3, generator).t[:, 1:] for _ in range(500)])  # [500, 4, 3]
    for image in range(4):
        for part in range(3):
            counts = torch.bincount(t[:, image, part], minlength=14)
            expected = torch.zeros(14)
            expected[2 + 4 * part : 6 + 4 * part] = 1 / 4
            assert fits(counts, expected)


def test_bound_depends_only_on_its_generator():
    d = make(2, 20, model=Fixed(2, 20), image_shape=(1, 8, 8))
    x_0 = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    torch.manual_seed(0)
    first = d.variational_bound(x_0, 2, seeded(1))
    torch.manual_seed(1)
    assert torch.equal(d.variational_bound(x_0, 2, seeded(1)), first)
    assert not torch.equal(d.variational_bound(x_0, 2, seeded(2)), first)


def test_bound_of_one_timestep():
    """Only L_0: a network that knows nothing pays log 2 per pixel."""
    x_0 = torch.randint(0, 2, (3, 1, 4, 4), generator=seeded())
    for num_t in (None, 1):
        bound = make(2, 1, image_shape=(1, 4, 4)).bound_terms(x_0, num_t)
        assert bound.L_t_minus_1.tolist() == [0, 0, 0]
        np.testing.assert_allclose(bound.total, 16 * math.log(2), rtol=1e-12)


def test_bound_uses_the_label_of_each_image():
    d = make(2, 4, model=Labelled(), image_shape=(1, 1, 1))
    x_0, y = torch.zeros(5, 1, 1, 1, dtype=torch.long), torch.tensor([0, 4, -1, 2, 1])
    with_labels = d.bound_terms(x_0, 2, seeded(), y, batch_size=2).terms
    assert d.model.seen.tolist() == [1]  # the last batch
    for n in range(5):  # at t = 1 the term is -log softmax(logits)[0], whatever x_1 was
        value = y[n].item() + 1
        assert with_labels[n, 0].item() == pytest.approx(math.log1p(math.exp(-3 * value)), rel=1e-9)
    assert torch.equal(
        d.variational_bound(x_0, 2, seeded(), y), d.bound_terms(x_0, 2, seeded(), y).total
    )
    np.testing.assert_allclose(d.bound_terms(x_0).L_0, math.log(2), rtol=1e-12)


def test_bound_is_infinite_where_the_model_rules_out_the_truth():
    network = Constant(2, torch.tensor([0.0, -torch.inf], dtype=torch.float64))
    d = make(2, 4, model=network, image_shape=(1, 1, 1))
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.long)
    assert d.L_t_minus_1(x_0, x_0, torch.tensor([1])).item() == math.inf
    assert d.L_t_minus_1(1 - x_0, x_0, torch.tensor([1])).item() == 0
    assert d.variational_bound(x_0).item() == math.inf


def test_kl_divergence_and_its_gradient_at_zeros():
    q = torch.tensor([0.0, 0.25, 0.75, 0.0])
    p = torch.tensor([0.0, 0.5, 0.25, 0.25], requires_grad=True)
    divergence = kl(q.log()[None], p.log()[None])
    assert divergence.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(3), rel=1e-6)
    log_p = p.detach().log().requires_grad_()
    kl(q.log()[None], log_p[None]).backward()
    assert log_p.grad.tolist() == [0, -0.25, -0.75, 0]


# -- the loss --------------------------------------------------------------------------------------


def test_loss_is_cross_entropy():
    """The default loss is -log softmax, by hand, at random t and noise."""
    x_0 = torch.randint(0, 3, (4, 1, 2, 2), generator=seeded())
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    log_probs = [s - math.log(sum(math.exp(x) for x in scores.tolist())) for s in scores.tolist()]
    expected = -np.mean([log_probs[k] for k in x_0.flatten()])
    for dtype in (torch.int64, torch.uint8):
        d = make(3, model=Constant(3, scores), image_shape=(1, 2, 2))
        assert d.loss(x_0.to(dtype)).item() == pytest.approx(expected, abs=1e-12)


def test_loss_uses_its_arguments():
    d = make(2, image_shape=(1, 2, 2))
    x_0, t, u = (
        torch.ones(3, 1, 2, 2, dtype=torch.long),
        torch.tensor([1, 10, 20]),
        torch.full((3, 1, 2, 2), 0.4),
    )
    d.loss(x_0, t, u)
    x_t, seen_t = d.model.seen
    assert torch.equal(seen_t, t)
    # u = 0.4 flips a 1 to 0 exactly where bar_Q_t[1, 0] > 0.4
    assert x_t[:, 0, 0, 0].tolist() == [int(d.bar_Q[s, 1, 0] <= 0.4) for s in t]
    labelled = make(2, model=Labelled(), image_shape=(1, 2, 2))
    labelled.loss(x_0, t, u, torch.tensor([3, -1, 0]))
    assert labelled.model.seen.tolist() == [3, -1, 0]


@pytest.mark.parametrize("T, n", [(200, 128), (7, 128), (200, 3)])
def test_t_is_uniform_and_reaches_both_ends(T, n):
    torch.manual_seed(0)
    d = make(2, T)
    draws = torch.stack([d.draw_t(n) for _ in range(max(2000, 40 * T // n))])
    counts = torch.bincount(draws.flatten(), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1 and (counts[1:] > 0).all()
    expected = draws.numel() / T
    assert (counts[1:] - expected).abs().max() < 5 * expected**0.5
    # Every position in the batch sees every t, and batches are not sorted.
    error = len(draws) ** -0.5
    assert (draws.double().mean(0) - (T + 1) / 2).abs().max() < 5 * T / 12**0.5 * error
    assert draws.amin(0).max() <= max(1, T // 50) and draws.amax(0).min() >= T - T // 50
    for other in (draws[:, :1], draws.roll(1, 1)):
        assert (draws - other).sign().double().mean(0).abs().max() < 5 * error
    # Within a batch t is stratified: half of 1..T gets half of the batch, rounded.
    lower = (draws <= T // 2).sum(1)
    assert (lower - n * (T // 2) / T).abs().max() <= 1
    assert torch.equal(d.draw_t(n, seeded(5)), d.draw_t(n, seeded(5)))
