"""The mathematics, against enumeration and closed forms that share no code with diffusion.py."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from diffusion import LOSSES, TRANSITIONS, DiscreteDiffusion, draw, kl_divergence, linear_betas
from experiments import Argmax, JointForm

# Every legal combination, written out: a test below holds diffusion.TRANSITIONS against this list.
LEGAL = [
    (transition, schedule, K)
    for transition, schedules, Ks in [
        ("uniform", ("cosine", "linear", "mutual_info"), (2, 3, 5)),
        ("absorbing", ("mutual_info", "cosine"), (2, 3, 5)),
        ("gaussian", ("linear",), (3, 5)),
    ]
    for schedule in schedules
    for K in Ks
]


def make(K=2, T=20, schedule=None, model=None, cls=DiscreteDiffusion, **kwargs):
    return cls(model or Constant(K), num_classes=K, timesteps=T, schedule=schedule, **kwargs)


class Constant(torch.nn.Module):
    """A network that knows nothing: the same float64 logits for every pixel."""

    def __init__(self, K, logits=None):
        super().__init__()
        self.logits = torch.zeros(K, dtype=torch.float64) if logits is None else logits

    def forward(self, x_t, t):
        return self.logits.view(1, -1, 1, 1).expand(len(x_t), -1, *x_t.shape[2:])


def random_chain(K, S, T, seed=0, zeros=False):
    """Transition matrices without any structure, and their products taken one by one."""
    rng = np.random.default_rng(seed)
    Q = rng.random((T + 1, S, S)) + 0.05
    if zeros:
        Q[:, rng.random((S, S)) < 0.4] = 0
        Q += np.eye(S)
    Q /= Q.sum(-1, keepdims=True)
    Q[0] = np.eye(S)
    bar_Q = [np.eye(S)]
    for t in range(1, T + 1):
        bar_Q.append(bar_Q[-1] @ Q[t])
    return Q, np.stack(bar_Q)


def absorbing_chain(K, T):
    """Levels 0..K-1 and a mask state K that nothing leaves; all masked at T. Full of exact zeros."""
    Q = np.zeros((T + 1, K + 1, K + 1))
    Q[0] = np.eye(K + 1)
    for t in range(1, T + 1):
        beta = 1 / (T - t + 1)
        Q[t] = (1 - beta) * np.eye(K + 1)
        Q[t][:, K] += beta
    bar_Q = [np.eye(K + 1)]
    for t in range(1, T + 1):
        bar_Q.append(bar_Q[-1] @ Q[t])
    return Q, np.stack(bar_Q)


# -- Q and bar_Q ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_matrices(transition, schedule, K):
    """Shapes, float64, identity at 0, rows summing to one; bar_Q is the product."""
    T = 50
    S = K + 1 if transition == "absorbing" else K
    d = make(K, T, schedule, transition=transition)
    assert d.Q.shape == d.bar_Q.shape == (T + 1, S, S) and d.num_states == S
    assert d.Q.dtype == d.bar_Q.dtype == torch.float64
    assert torch.equal(d.Q[0], torch.eye(S, dtype=torch.float64)) and torch.equal(d.bar_Q[0], d.Q[0])
    product = np.eye(S)
    for t in range(1, T + 1):
        product = product @ d.Q[t].numpy()
        np.testing.assert_allclose(d.bar_Q[t], product, atol=1e-13)
    for matrix in (d.Q, d.bar_Q):
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-13)


def betas_by_hand(schedule, T):
    """The schedules as the paper states them, in plain Python."""
    if schedule == "cosine":
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) for t in range(T + 1)]
        return [1 - f[t] / f[t - 1] for t in range(1, T + 1)]
    if schedule == "mutual_info":
        return [1 / (T - t + 1) for t in range(1, T + 1)]
    return [1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1) for t in range(1, T + 1)]


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("transition, schedule, K", [c for c in LEGAL if c[0] != "gaussian"])
def test_closed_forms(transition, schedule, K):
    """bar_Q = alpha_bar I + (1 - alpha_bar) times the uniform distribution, or the mask."""
    T, alpha_bar = 50, 1.0
    d = make(K, T, schedule, transition=transition)
    S = d.num_states
    target = np.eye(S)[[K] * S] if transition == "absorbing" else np.full((S, S), 1 / K)
    for t, beta in enumerate(betas_by_hand(schedule, T), start=1):
        alpha_bar *= 1 - beta
        np.testing.assert_allclose(d.Q[t], (1 - beta) * np.eye(S) + beta * target, atol=1e-13)
        np.testing.assert_allclose(d.bar_Q[t], alpha_bar * np.eye(S) + (1 - alpha_bar) * target, atol=1e-13)


@pytest.mark.parametrize("K", [3, 5, 16])
def test_gaussian_transitions(K):
    """Appendix A.2.3, entry by entry; symmetric, so doubly stochastic; nearer levels are likelier; uniform at T."""
    T = 50
    d = make(K, T, transition="gaussian")
    betas = TRANSITIONS["gaussian"][1]["linear"](T, K)
    np.testing.assert_allclose(np.diff(betas), (betas[-1] - betas[0]) / (T - 1), rtol=1e-9)
    for t in range(1, T + 1):
        scale = (K - 1) ** 2 * betas[t - 1].item()
        total = sum(math.exp(-4 * n**2 / scale) for n in range(-(K - 1), K))
        for i, j in itertools.product(range(K), repeat=2):
            if i != j:
                assert d.Q[t, i, j].item() == pytest.approx(math.exp(-4 * (i - j) ** 2 / scale) / total, abs=1e-14)
        assert (d.Q[t].diff(dim=1)[0, 1:] <= 0).all()
    np.testing.assert_allclose(d.Q, d.Q.mT, atol=1e-15)
    assert d.Q[1, 1, 1].item() == pytest.approx(0.999, abs=1e-4)  # the first step moves one pixel in a thousand
    assert 0.5 * (d.bar_Q[T] - 1 / K).abs().sum(-1).max() <= 1e-4
    paper = torch.linspace(1e-4, 0.02, 200, dtype=torch.float64)
    stuck = TRANSITIONS["gaussian"][0](K, paper)
    assert 0.5 * (torch.linalg.matrix_power(stuck[-1], 200) - 1 / K).abs().sum(-1).max() > 0.01


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_absorbing_ends_all_masked(K, schedule):
    """Exactly: nothing survives to T, L_T is 0, sampling starts from the mask, and no level turns into another."""
    d = make(K, 30, schedule, transition="absorbing")
    assert torch.equal(d.bar_Q[30], torch.eye(K + 1, dtype=torch.float64)[[K] * (K + 1)])
    assert d.L_T(torch.zeros(1, 1, 8, 8, dtype=torch.long)).item() == 0
    assert (next(d.reverse_process(2, shape=(1, 8, 8))) == K).all()
    off = d.bar_Q[:, :K, :K] - torch.diag_embed(d.bar_Q[:, :K, :K].diagonal(dim1=1, dim2=2))
    assert (off == 0).all()
    assert d.sample(2, shape=(1, 8, 8)).max() < K


def test_legal_combinations():
    """Each family goes with these schedules, the first being its default; everything else is an error in one line."""
    listed = {transition: [] for transition, _, _ in LEGAL}
    for transition, schedule, _ in LEGAL:
        if schedule not in listed[transition]:
            listed[transition].append(schedule)
    assert {name: list(schedules) for name, (_, schedules) in TRANSITIONS.items()} == listed
    illegal = [("absorbing", "linear", 2), ("gaussian", "cosine", 4), ("gaussian", "mutual_info", 4)]
    for transition, schedule, K in [*illegal, ("gaussian", "linear", 2), ("uniform", "nonsense", 2)]:
        with pytest.raises(ValueError) as error:
            make(K, 20, schedule, transition=transition)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="take more"):
        make(4, 1, transition="gaussian")
    with pytest.raises(ValueError, match="masked"):
        TRANSITIONS["absorbing"][0](2, linear_betas(20, 2))


def test_cosine_schedule_is_the_papers():
    T = 200
    d = make(2, T)
    for t in range(T + 1):
        alpha_bar = math.cos((t / T + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        assert d.bar_Q[t, 0, 0] - d.bar_Q[t, 0, 1] == pytest.approx(alpha_bar, abs=1e-12)


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("T", [1, 2, 10, 200, 1000])
def test_default_schedule_reaches_noise(K, T):
    d = make(K, T)
    assert 0.5 * (d.bar_Q[T] - 1 / K).abs().sum(-1).max() < 1e-3
    np.testing.assert_allclose(d.prior, 1 / K, atol=1e-12)
    assert d.L_T(torch.zeros(1, 1, 32, 32, dtype=torch.long)).item() == pytest.approx(0, abs=1e-9)


def test_linear_schedule_falls_short_and_says_so():
    """With T = 200 it ends at [[0.566, 0.434], [0.434, 0.566]], and L_T is 8.97 nats per 32x32 image."""
    with pytest.warns(UserWarning, match="far from stationary"):
        d = make(2, 200, "linear")
    np.testing.assert_allclose(d.bar_Q[200], [[0.566, 0.434], [0.434, 0.566]], atol=5e-4)
    stay = 0.5 + 0.5 * np.prod(1 - np.linspace(1e-4, 0.02, 200))
    L_T = 1024 * (stay * math.log(2 * stay) + (1 - stay) * math.log(2 * (1 - stay)))
    assert d.L_T(torch.ones(3, 1, 32, 32, dtype=torch.uint8)).tolist() == pytest.approx([L_T] * 3, rel=1e-5)
    assert pytest.approx(8.97, abs=0.005) == L_T


def test_own_matrices():
    """A ready Q replaces the family; S may exceed K; what is not a chain is refused."""
    Q, bar_Q = random_chain(3, 4, 6)
    d = DiscreteDiffusion(Constant(3), num_classes=3, timesteps=6, Q=torch.from_numpy(Q))
    np.testing.assert_allclose(d.bar_Q, bar_Q, atol=1e-13)
    np.testing.assert_allclose(d.prior, bar_Q[6, :3].mean(0), atol=1e-13)
    bad = {"identity": Q[[1] * 7], "one": Q * 1.1, "timesteps": Q[:5], "S >= 5": Q}
    for word, matrices in bad.items():
        with pytest.raises(ValueError, match=word):
            DiscreteDiffusion(Constant(3), 5 if word == "S >= 5" else 3, 6, Q=torch.from_numpy(matrices))


@pytest.mark.parametrize(
    "kwargs", [{"num_classes": 1}, {"timesteps": 0}, {"transition": "nonsense"}, {"schedule": "nonsense"}]
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError):
        DiscreteDiffusion(Constant(2), **kwargs)


# -- forward noising --------------------------------------------------------------------------------------------------


def chi_square(counts, expected):
    """Pearson's statistic; a state that can't occur must not occur."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum()


CHI_SQUARE_LIMIT = {
    1: 15.1,
    2: 18.4,
    3: 21.1,
    4: 23.5,
    5: 25.7,
}  # exceeded by chance once in 10,000, by degrees of freedom


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_q_sample_frequencies(transition, schedule, K):
    torch.manual_seed(K)
    d = make(K, 20, schedule, transition=transition)
    for t, level in itertools.product((1, 7, 20), range(K)):
        x_t = d.q_sample(torch.full((20, 1, 50, 50), level), torch.full((20,), t))
        counts = torch.bincount(x_t.flatten(), minlength=d.num_states)
        assert chi_square(counts, d.bar_Q[t, level] * x_t.numel()) < CHI_SQUARE_LIMIT[K]


def test_q_sample_mixed_t_and_zeros():
    """Each image uses its own t; t = 0 changes nothing; states of probability zero never occur."""
    torch.manual_seed(0)
    Q, bar_Q = absorbing_chain(2, 4)
    d = DiscreteDiffusion(Constant(2), 2, 4, Q=torch.from_numpy(Q))
    x_0 = torch.randint(0, 2, (5, 1, 100, 100))
    x_t = d.q_sample(x_0, torch.arange(5))
    assert torch.equal(x_t[0], x_0[0]) and (x_t[4] == 2).all()
    for t in range(5):
        for level in (0, 1):
            chosen = x_t[t][x_0[t] == level]
            counts = torch.bincount(chosen, minlength=3)
            assert chi_square(counts, bar_Q[t, level] * len(chosen)) < CHI_SQUARE_LIMIT[1]


def test_noising_step_by_step_is_the_jump():
    """Composing q(x_t | x_{t-1}), drawn here by torch.multinomial, gives the law of q_sample."""
    torch.manual_seed(1)
    K, t = 3, 12
    d = make(K)
    x = torch.zeros(40_000, dtype=torch.long)
    for step in range(1, t + 1):
        x = torch.multinomial(d.Q[step][x], 1)[:, 0]
    walked = torch.bincount(x, minlength=K)
    jumped = torch.bincount(d.q_sample(torch.zeros(1, 1, 200, 200), torch.tensor([t])).flatten(), minlength=K)
    assert chi_square(walked, (walked + jumped) / 2) + chi_square(jumped, (walked + jumped) / 2) < CHI_SQUARE_LIMIT[2]


def test_draw_inverts_the_cumulative_distribution():
    """Exact borders, and no state of probability zero even at the largest u, whatever rounding does."""
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25]).view(1, 4, 1, 1)
    for u, state in [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-24, 3)]:
        assert draw(probs, torch.full((1, 1, 1, 1), u)).item() == state
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 6, 1, 1, generator=generator)
    probs[:, -1] = 0
    probs /= probs.sum(1, keepdim=True)
    assert draw(probs, torch.full((2000, 1, 1, 1), 1 - 2**-24)).max() < 5
    probs = torch.cat([torch.zeros(2000, 1, 1, 1), probs], dim=1)
    assert draw(probs, torch.zeros(2000, 1, 1, 1)).min() > 0


# -- the posterior, by brute force ------------------------------------------------------------------------------------


def brute_force_posterior(Q, bar_Q, t, x_t, w):
    """p(x_{t-1} | x_t) under w(x_0), summing the exact posteriors of Bayes' rule over every (x_0, x_{t-1})."""
    S, K = Q.shape[-1], len(w)
    possible = [x_0 for x_0 in range(K) if bar_Q[t][x_0, x_t] > 0]
    mass = sum(w[x_0] for x_0 in possible)
    result = np.zeros(S)
    for x_0 in possible:
        joint = np.array([bar_Q[t - 1][x_0, x_before] * Q[t][x_before, x_t] for x_before in range(S)])
        result += w[x_0] / mass * joint / joint.sum()
    return result


def chains():
    for transition, schedule, K in LEGAL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = make(K, 6 if transition != "gaussian" else 20, schedule, transition=transition)
        yield pytest.param(K, d.Q.numpy(), d.bar_Q.numpy(), id=f"{transition}-{schedule}-{K}")
    for K in (2, 3, 5):
        yield pytest.param(K, *random_chain(K, K, 6), id=f"random-{K}")
        yield pytest.param(K, *random_chain(K, K + 2, 6, zeros=True), id=f"zeros-{K}")


@pytest.mark.parametrize("K, Q, bar_Q", list(chains()))
@pytest.mark.parametrize("x_0_kind", ["one-hot", "spread"])
@pytest.mark.filterwarnings("ignore:bar_Q")
def test_posterior_is_bayes_rule(K, Q, bar_Q, x_0_kind):
    T, S = len(Q) - 1, Q.shape[-1]
    d = DiscreteDiffusion(Constant(K), K, T, Q=torch.from_numpy(Q))
    rng = np.random.default_rng(0)
    ws = np.eye(K) if x_0_kind == "one-hot" else rng.dirichlet(np.ones(K), 4)
    compared = 0
    for t in range(1, T + 1):
        for x_t, w in itertools.product(range(S), ws):
            if sum(w[k] for k in range(K) if bar_Q[t][k, x_t] > 0) == 0:
                continue
            probs = torch.from_numpy(w).view(1, K, 1, 1)
            got = d.q_posterior(torch.tensor([[[[x_t]]]]), probs, torch.tensor([t]))[0, :, 0, 0]
            np.testing.assert_allclose(got, brute_force_posterior(Q, bar_Q, t, x_t, w), atol=1e-12)
            compared += 1
    assert compared >= T * K


def test_posterior_pixel_layout():
    """A batch with its own t, x_t and w everywhere equals its pixels one by one."""
    torch.manual_seed(0)
    d = make(3)
    x_t, t = torch.randint(0, 3, (4, 1, 2, 5)), torch.tensor([1, 5, 19, 20])
    w = torch.rand(4, 3, 2, 5, dtype=torch.float64)
    w /= w.sum(1, keepdim=True)
    whole = d.q_posterior(x_t, w, t)
    for b, i, j in itertools.product(range(4), range(2), range(5)):
        expected = brute_force_posterior(
            d.Q.numpy(), d.bar_Q.numpy(), t[b].item(), x_t[b, 0, i, j].item(), w[b, :, i, j].numpy()
        )
        np.testing.assert_allclose(whole[b, :, i, j], expected, atol=1e-12)


@pytest.mark.parametrize("K", [8, 16])
def test_posterior_stays_finite_in_float32(K):
    """Gaussian chains hold likelihoods down to 1e-80: dividing by what float32 barely represents would overflow."""
    d = make(K, 100, transition="gaussian")
    x_t = torch.arange(K).view(1, 1, 1, K).expand(100, 1, 1, K)
    p = d.q_posterior(x_t, torch.full((100, K, 1, K), 1 / K), torch.arange(1, 101))
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)


def test_bound_stays_finite_where_probabilities_underflow():
    """Between far levels a Gaussian kernel falls below what float32 can hold: no reason for an infinite bound."""
    d = make(8, 200, transition="gaussian")
    x_0, x_t, t = torch.tensor([[[[2, 5]]]]), torch.tensor([[[[0, 0]]]]), torch.tensor([36])
    w = torch.tensor([0.998, 1.1e-3, 3.1e-4, 1.0e-4, 4.0e-5, 1.5e-5, 6.2e-6, 8.3e-7])  # a trained network's
    logits = w.log().view(1, 8, 1, 1).expand(1, 8, 1, 2)
    low, high = (d.L_t_minus_1(x_0, x_t, t, v).item() for v in (logits, logits.double()))
    assert low == pytest.approx(high, rel=1e-4)


def test_posterior_refuses_the_impossible():
    """A visible pixel of an absorbing chain was always that level: any other x_0 alone is an error, not a NaN."""
    d = DiscreteDiffusion(Constant(2), 2, 5, Q=torch.from_numpy(absorbing_chain(2, 5)[0]))
    x_t, t = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.tensor([2])
    with pytest.raises(ValueError, match="no probability"):
        d.q_posterior(x_t, torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), t)
    with pytest.raises(ValueError, match="clean data"):
        d.q_posterior(x_t, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0]))
    kept = d.q_posterior(x_t, torch.tensor([0.3, 0.7]).view(1, 2, 1, 1), t)
    np.testing.assert_allclose(kept.flatten(), [1, 0, 0], atol=1e-7)


# -- exactness: a perfect network makes a perfect sampler and the bound that theory says ------------------------------


class ExactPosterior(torch.nn.Module):
    """log p(x_0^i | x_t) for each pixel i, by enumerating a toy data set: what cross-entropy converges to."""

    def __init__(self, images, probs, bar_Q):
        super().__init__()
        self.images, self.probs, self.bar_Q = images, probs, bar_Q  # [N, D] levels, [N], [T+1, S, S]; numpy

    def forward(self, x_t, t):
        K = self.images.max() + 1
        flat = x_t.flatten(1).numpy()
        # likelihood[b, n] = product over pixels of bar_Q_t[image_n[i], x_t[b, i]]
        likelihood = np.prod(self.bar_Q[t.numpy()[:, None, None], self.images[None], flat[:, None]], axis=-1)
        posterior = likelihood * self.probs
        posterior = posterior / np.maximum(posterior.sum(1, keepdims=True), 1e-300)
        pixel = np.stack([posterior @ (self.images == k) for k in range(K)], axis=1)  # [B, K, D]
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(pixel).reshape(len(flat), K, *x_t.shape[2:]))


def toy(name, K):
    """images [N, D], probs [N], shape. One pixel with P(x_0 = 1) = 0.1, or correlated 2x2 images."""
    if name == "pixel":
        probs = {2: [0.9, 0.1], 3: [0.6, 0.1, 0.3]}[K]
        return np.arange(K)[:, None], np.array(probs), (1, 1, 1)
    images = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [K - 1, 0, 0, K - 1]])
    return images, np.array([0.3, 0.25, 0.2, 0.15, 0.1]), (1, 2, 2)


class ExactChain:
    """A toy data set, the perfect network for it, and every state x of the image space."""

    def __init__(self, name, K=2, T=20, cls=DiscreteDiffusion, steps=None, **kwargs):
        self.images, self.probs, self.shape = toy(name, K)
        reference = make(K, T, **kwargs)
        self.bar_Q, self.Q = reference.bar_Q.numpy(), reference.Q.numpy()
        self.d = make(K, T, model=ExactPosterior(self.images, self.probs, self.bar_Q), cls=cls, **kwargs)
        if steps is not None:  # the network stays the one of the T original timesteps
            self.d, T = self.d.respaced(steps), len(steps)
            kept = [0, *steps]
            self.bar_Q = self.bar_Q[kept]
            self.Q = np.stack([np.eye(self.Q.shape[-1])] + [
                np.linalg.multi_dot([np.eye(self.Q.shape[-1]), *self.Q[a + 1 : b + 1]])
                for a, b in itertools.pairwise(kept)
            ])  # fmt: skip
        self.T, D, S = T, self.images.shape[1], self.Q.shape[-1]
        self.states = np.array(list(itertools.product(range(S), repeat=D)))  # [N, D]

    def likelihood(self, t):
        """q(x_t | x_0) for every data image and every state, [images, states]."""
        return np.prod(self.bar_Q[t][self.images[:, None], self.states[None]], axis=-1)

    def marginal(self, t):
        return self.probs @ self.likelihood(t)

    def reverse_kernel(self, t):
        """p_theta(x_{t-1} | x_t) between all states, [x_t, x_{t-1}], for the x_t that can occur; others stay zero."""
        possible = self.marginal(t) > 0
        x_t = torch.from_numpy(self.states[possible]).view(-1, *self.shape)
        p = self.d.p_theta(x_t, torch.full((len(x_t),), t)).flatten(2).numpy()  # [N, S, D]
        kernel = np.zeros((len(self.states),) * 2)
        kernel[possible] = np.prod([p[:, self.states[:, i], i] for i in range(p.shape[2])], axis=0)
        return kernel

    def final_distribution(self):
        distribution = self.marginal(self.T)
        for t in range(self.T, 0, -1):
            distribution = distribution @ self.reverse_kernel(t)
        return distribution

    def mean_bound(self):
        """E over x_0 and x_t of the bound's terms as the class computes them."""
        bound = 0.0
        for image, prob, by_t in zip(self.images, self.probs, range(len(self.images)), strict=True):
            x_0 = torch.from_numpy(image).view(1, *self.shape)
            bound += prob * self.d.L_T(x_0).double().item()
            for t in range(1, self.T + 1):
                weights = self.likelihood(t)[by_t]
                x_t = torch.from_numpy(self.states[weights > 0]).view(-1, *self.shape)
                terms = self.d.L_t_minus_1(x_0.expand(len(x_t), -1, -1, -1), x_t, torch.full((len(x_t),), t))
                bound += prob * (weights[weights > 0] @ terms.numpy())
        return bound

    def theory(self):
        """H(x_0) + KL(q(x_T) || prior); the sum over t of E KL(q(x_{t-1} | x_t) || product of its pixel marginals)."""
        entropy = -(self.probs * np.log(self.probs)).sum()
        q_T, prior = self.marginal(self.T), np.prod(self.d.prior.numpy()[self.states], axis=-1)
        seen = q_T > 0
        prior_gap = (q_T[seen] * np.log(q_T[seen] / prior[seen])).sum()
        factorization_gap = 0.0
        D, S = self.states.shape[1], self.Q.shape[-1]
        for t in range(1, self.T + 1):
            step = np.prod(self.Q[t][self.states[:, None], self.states[None]], axis=-1)  # [x_{t-1}, x_t]
            joint = self.marginal(t - 1)[:, None] * step
            for column in joint.T[joint.sum(0) > 0]:
                conditional = column / column.sum()
                product = np.ones(len(self.states))
                for i in range(D):
                    pixel = np.array([conditional[self.states[:, i] == s].sum() for s in range(S)])
                    product *= pixel[self.states[:, i]]
                on = conditional > 0
                factorization_gap += column.sum() * (conditional[on] * np.log(conditional[on] / product[on])).sum()
        return entropy + prior_gap, factorization_gap


EXACT = [({"transition": transition, "schedule": schedule}, K) for transition, schedule, K in LEGAL if K < 5]
EXACT.append(({"Q": "random"}, 2))


def exact_chain(name, K, T=20, cls=DiscreteDiffusion, **kwargs):
    if kwargs.get("Q") == "random":
        kwargs["Q"] = torch.from_numpy(random_chain(K, K, T)[0])
    return ExactChain(name, K, T, cls, **kwargs)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("kwargs, K", EXACT)
def test_one_pixel_returns_the_data_distribution(kwargs, K):
    chain = exact_chain("pixel", K, **kwargs)
    expected = np.zeros(len(chain.states))
    expected[:K] = chain.probs
    np.testing.assert_allclose(chain.final_distribution(), expected, atol=1e-9)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("name", ["pixel", "2x2"])
@pytest.mark.parametrize("kwargs, K", EXACT)
def test_mean_bound_is_what_theory_says(name, kwargs, K):
    """It exceeds the entropy by the prior's and the factorization's divergence, and by nothing else."""
    chain = exact_chain(name, K, T=20 if kwargs.get("transition") == "gaussian" else 6, **kwargs)
    base, gap = chain.theory()
    assert gap > 1e-5 if name == "2x2" else gap == pytest.approx(0, abs=1e-9)
    reaches_noise = kwargs.get("schedule") != "linear" or kwargs["transition"] == "gaussian"
    tolerance = 1e-9 if reaches_noise and "Q" not in kwargs else 1e-6  # L_T > 0 is float32
    assert chain.mean_bound() == pytest.approx(base + gap, abs=tolerance)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("kwargs, K", EXACT)
def test_respaced_chain_is_exact(kwargs, K):
    """With uneven gaps and the network of the whole chain: it returns the data; its bound is what theory says."""
    steps = [1, 4, 5, 13, 20]
    pixel = exact_chain("pixel", K, steps=steps, **kwargs)
    np.testing.assert_allclose(pixel.final_distribution()[:K], pixel.probs, atol=1e-9)
    square = exact_chain("2x2", K, steps=steps, **kwargs)
    assert square.mean_bound() == pytest.approx(sum(square.theory()), abs=1e-6)


@pytest.mark.parametrize("transition, K", [("uniform", 2), ("absorbing", 2), ("gaussian", 3)])
def test_factorization_gap_shrinks_with_T(transition, K):
    gaps = [exact_chain("2x2", K, T, transition=transition).theory()[1] for T in (20, 60, 180)]
    assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2] > 0


@pytest.mark.parametrize("transition, K", [("uniform", 2), ("uniform", 3), ("gaussian", 3)])
@pytest.mark.parametrize("cls", [JointForm, Argmax])
def test_the_wrong_reverse_steps_fail_the_exactness_tests(cls, transition, K):
    """The tests above can tell: with the joint form or the argmax, chain and bound are both off."""
    pixel = exact_chain("pixel", K, cls=cls, transition=transition)
    assert np.abs(pixel.final_distribution() - pixel.probs).max() > 1e-4
    assert pixel.mean_bound() > sum(pixel.theory()) + 1e-3
    square = exact_chain("2x2", K, T=20, cls=cls, transition=transition)
    assert square.mean_bound() > sum(square.theory()) + 1e-3


def test_joint_form_is_the_mixture_for_absorbing():
    """There q(x_t | x_0) is the same for every x_0 that can have led to x_t, so counting it twice changes nothing."""
    for T in (1, 6, 20):
        mixture, joint = (
            exact_chain("2x2", 3, T, cls=c, transition="absorbing") for c in (DiscreteDiffusion, JointForm)
        )
        for t in range(1, T + 1):
            np.testing.assert_allclose(mixture.reverse_kernel(t), joint.reverse_kernel(t), atol=1e-12)


# -- fewer steps ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_respaced_matrices(transition, schedule, K):
    """Walking through the skipped steps one by one is the step between the kept ones; bar_Q stays what it was."""
    whole = make(K, 20, schedule, transition=transition)
    for steps, kept in [(1, [20]), (4, None), (19, None), (20, list(range(1, 21))), ([2, 3, 20], [2, 3, 20])]:
        d = whole.respaced(steps)
        kept = kept or d.network_t.tolist()[1:]
        assert d.network_t.tolist() == [0, *kept] and d.timesteps == len(kept) and d.model is whole.model
        assert kept == sorted(set(kept)) and kept[0] > 0 and kept[-1] == 20
        for i, (before, t) in enumerate(itertools.pairwise([0, *kept])):
            rows = np.eye(d.num_states)
            for s in range(before + 1, t + 1):
                rows = rows @ whole.Q[s].numpy()
            np.testing.assert_allclose(d.Q[i + 1], rows, atol=1e-12)
            np.testing.assert_allclose(d.bar_Q[i + 1], whole.bar_Q[t], atol=1e-12)
        x_0 = torch.randint(0, K, (2, 1, 3, 3))
        assert torch.allclose(d.L_T(x_0), whole.L_T(x_0), atol=1e-6)


def test_a_number_of_steps_is_spread_evenly_over_what_is_lost():
    """Against closed forms: alpha_bar = cos(...) at the kept timesteps, and 1 - t/T, which is even in t."""
    assert make(2, 20, "mutual_info", transition="absorbing").respaced(4).network_t.tolist() == [0, 5, 10, 15, 20]
    t = make(2, 200, "cosine").respaced(15).network_t.double()
    alpha_bar = torch.cos((t / 200 + 0.008) / 1.008 * torch.pi / 2)
    lost = 1 - alpha_bar / alpha_bar[0]
    assert (lost - torch.arange(16) / 15).abs().max() < 0.005  # half of the largest step of 200


def test_respacing_again_and_by_nothing():
    network = RandomNetwork(2, 2, 20)
    whole = make(2, 20, model=network, cls=JointForm)
    again = whole.respaced(list(range(2, 21, 2))).respaced([1, 5, 10])
    assert again.network_t.tolist() == [0, 2, 10, 20] and isinstance(again, JointForm)
    assert torch.allclose(again.Q, whole.respaced([2, 10, 20]).Q)
    assert torch.equal(whole.respaced(20).sample(50, shape=(1, 1, 2)), whole.sample(50, shape=(1, 1, 2)))
    rebuilt = JointForm(network, **again.config)  # what a checkpoint of it would do
    assert torch.equal(rebuilt.sample(50, shape=(1, 1, 2)), again.sample(50, shape=(1, 1, 2)))


@pytest.mark.parametrize("steps", [0, 21, -1, [], [5], [0, 20], [5, 5, 20], [9, 5, 20], [5, 21]])
def test_respacing_refuses_other_timesteps(steps):
    with pytest.raises(ValueError, match="20"):
        make(2, 20).respaced(steps)


# -- the bound of a network that is not perfect, against the likelihood of its whole chain ----------------------------


class RandomNetwork(torch.nn.Module):
    """Arbitrary logits for every (x_t, t) of a two-pixel image."""

    def __init__(self, K, S, T):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = 2 * torch.randn(T + 1, S, S, K, 1, 2, dtype=torch.float64, generator=generator)

    def forward(self, x_t, t):
        return self.table[t, x_t[:, 0, 0, 0], x_t[:, 0, 0, 1]]


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("transition, schedule, K", [c for c in LEGAL if c[2] < 5])
def test_bound_and_losses_against_all_trajectories(transition, schedule, K):
    """E_q log q(x_1..x_T | x_0) / p(x_0..x_T), summed over every trajectory, is the bound, and at least -log p(x_0).

    The losses, averaged over every t and x_t, are the bound without L_T, the cross-entropy, and their weighted sum.
    """
    T, S = 3, K + (transition == "absorbing")
    network = RandomNetwork(K, S, T)
    kwargs = {"model": network, "transition": transition, "schedule": schedule}
    if transition == "gaussian":  # three steps can't reach noise: wide kernels as they are
        steps = TRANSITIONS[transition][0](K, torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
        kwargs["Q"] = torch.cat([torch.eye(K, dtype=torch.float64)[None], steps])
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
        possible = d.bar_Q[t, :K].numpy().max(0) > 0  # states that some level can have led to
        x_t_possible = [n for n in range(N) if possible[list(states[n])].all()]
        p = d.p_theta(x[x_t_possible], torch.full((len(x_t_possible),), t))[:, :, 0].numpy()
        kernel = np.zeros((N, N))
        kernel[x_t_possible] = [[row[b[0], 0] * row[b[1], 1] for b in states] for row in p]
        back.append(kernel)
    prior = np.array([np.prod([d.prior[s] for s in state]) for state in states])
    likelihood = prior
    for t in range(T, 0, -1):
        likelihood = likelihood @ back[t]

    for start in (n for n in range(N) if max(states[n]) < K):
        bound = 0.0
        for path in itertools.product(range(N), repeat=T):
            walk = (start, *path)
            q = np.prod([step[t][walk[t - 1], walk[t]] for t in range(1, T + 1)])
            if q > 0:
                p = prior[walk[-1]] * np.prod([back[t][walk[t], walk[t - 1]] for t in range(1, T + 1)])
                bound += q * np.log(q / p)
        assert bound >= -np.log(likelihood[start]) - 1e-12

        terms, cross_entropy = 0.0, 0.0
        mean_loss = dict.fromkeys(LOSSES, 0.0)
        for t, n in itertools.product(range(1, T + 1), range(N)):
            weight = np.prod([d.bar_Q[t, a, b] for a, b in zip(states[start], states[n], strict=True)])
            if weight == 0:
                continue
            x_0, x_t, time = x[[start]], x[[n]], torch.tensor([t])
            terms += weight * d.L_t_minus_1(x_0, x_t, time).item()
            scores = network(x_t, time)[0, :, 0].numpy()
            log_probs = scores - np.log(np.exp(scores).sum(0))
            cross_entropy -= weight / T * np.mean([log_probs[states[start][i], i] for i in (0, 1)])
            for name in LOSSES:
                trained = make(K, T, loss_type=name, hybrid_weight=0.3, **kwargs)
                trained.q_sample = lambda *_, x_t=x_t: x_t
                mean_loss[name] += weight / T * trained.loss(x_0, time).item()
        L_T = d.L_T(x[[start]]).double().item()
        assert L_T + terms == pytest.approx(bound, abs=1e-6)
        assert mean_loss["variational"] == pytest.approx(terms / 2, abs=1e-9)
        assert mean_loss["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-9)
        assert mean_loss["hybrid"] == pytest.approx(terms / 2 + 0.3 * cross_entropy, abs=1e-9)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize(
    "cls, schedule, expected",
    [
        (DiscreteDiffusion, "cosine", 0.1000),
        (JointForm, "cosine", 0.2490),
        (Argmax, "cosine", 0.1049),
        (DiscreteDiffusion, "linear", 0.1025),
        (Argmax, "linear", 0.1081),
    ],
)
def test_reference_figures_of_the_three_reverse_steps(cls, schedule, expected):
    """P(x_0 = 1) of the one-pixel chain, started from noise, as found independently before this code was written."""
    chain = ExactChain("pixel", 2, 200, cls, schedule=schedule)
    distribution = chain.d.prior.numpy()
    for t in range(200, 0, -1):
        distribution = distribution @ chain.reverse_kernel(t)
    assert distribution[1] == pytest.approx(expected, abs=5e-5)


# -- bound and loss as they are called in practice --------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 1, 3])
def test_variational_bound_is_unbiased(samples):
    """The random estimates agree with the enumerated mean of the one-pixel chain within 4 standard errors."""
    chain = exact_chain("pixel", 2, T=8)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    x_0 = torch.zeros(n, 1, 1, 1, dtype=torch.long)
    x_0[: n // 10] = 1  # exactly P(x_0 = 1) = 0.1
    bounds = chain.d.variational_bound(x_0, samples, generator).double()
    assert bounds.shape == (n,)
    error = max(bounds[: n // 10].std().item() * 0.1 / (n // 10) ** 0.5, bounds[n // 10 :].std().item() / n**0.5) * 1.5
    assert abs(bounds.mean().item() - sum(chain.theory())) < 4 * error


def test_bound_terms_of_a_network_that_knows_nothing():
    """Uniform logits: L_0 = D log K minus nothing learned, by Bayes' rule with a flat x_0, done by hand for T = 1."""
    d = make(2, 1)
    x_0 = torch.randint(0, 2, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(d.variational_bound(x_0), 16 * math.log(2), rtol=1e-6)


def test_bound_is_infinite_where_the_model_rules_out_the_truth():
    d = make(2, 4, model=Constant(2, torch.tensor([0.0, -torch.inf], dtype=torch.float64)))
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.long)
    assert d.L_t_minus_1(x_0, x_0, torch.tensor([1])).item() == math.inf
    assert d.L_t_minus_1(1 - x_0, x_0, torch.tensor([1])).item() == 0


def test_float32_bound_is_accurate():
    """What float32 costs on a whole image over all t is far below what any table quotes."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 1, 2, 32, 32, generator=generator)

    class Fixed(torch.nn.Module):
        def forward(self, x_t, t):
            return logits[t[0] - 1].to(self.dtype).expand(len(x_t), -1, -1, -1)

    x_0 = torch.randint(0, 2, (2, 1, 32, 32), generator=generator)
    bounds = []
    for dtype in (torch.float32, torch.float64):
        model = Fixed()
        model.dtype = dtype
        bounds.append(make(2, 200, model=model).variational_bound(x_0, None, torch.Generator().manual_seed(1)).double())
    np.testing.assert_allclose(bounds[0], bounds[1], rtol=2e-6)


def test_kl_divergence_and_its_gradient_at_zeros():
    q = torch.tensor([0.0, 0.25, 0.75, 0.0])
    p = torch.tensor([0.0, 0.5, 0.25, 0.25], requires_grad=True)
    kl = kl_divergence(q, p, dim=0)
    assert kl.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(3), rel=1e-6)
    kl.backward()
    np.testing.assert_allclose(p.grad, [0, -0.5, -3, 0], rtol=1e-6)


def test_loss_is_cross_entropy():
    """Against -log softmax by hand, at t and noise that are given."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 3, (4, 1, 2, 2), generator=generator)
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    d = make(3, model=Constant(3, scores))
    log_probs = [s - math.log(sum(math.exp(x) for x in scores.tolist())) for s in scores.tolist()]
    expected = -np.mean([log_probs[k] for k in x_0.flatten()])
    assert d.loss(x_0).item() == pytest.approx(expected, abs=1e-12)


def test_loss_sees_the_noise_that_it_is_given():
    seen = {}

    class Spy(Constant):
        def forward(self, x_t, t):
            seen["x_t"], seen["t"] = x_t, t
            return super().forward(x_t, t)

    d = make(2, model=Spy(2))
    x_0, t, u = torch.ones(3, 1, 2, 2, dtype=torch.long), torch.tensor([1, 10, 20]), torch.full((3, 1, 2, 2), 0.4)
    d.loss(x_0, t, u)
    assert torch.equal(seen["t"], t)
    # u = 0.4 flips a 1 to 0 exactly where bar_Q_t[1, 0] > 0.4
    assert seen["x_t"][:, 0, 0, 0].tolist() == [int(d.bar_Q[s, 1, 0] <= 0.4) for s in t]


@pytest.mark.parametrize("T, n", [(200, 128), (7, 128), (200, 3)])
def test_t_is_uniform_and_reaches_both_ends(T, n):
    torch.manual_seed(0)
    d = make(2, T)
    draws = torch.stack([d.draw_t(n) for _ in range(max(2000, 40 * T // n))])
    counts = torch.bincount(draws.flatten(), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1 and (counts[1:] > 0).all()
    expected = draws.numel() / T
    assert (counts[1:] - expected).abs().max() < 5 * expected**0.5
    # Every place in the batch sees every t: position and t must not go together.
    assert (draws[:, 0].double().mean() - (T + 1) / 2).abs() < 4 * T / 12**0.5 / len(draws) ** 0.5
    assert draws[:, 0].min() <= max(1, T // 50) and draws[:, 0].max() >= T - T // 50


def test_guidance():
    """(1 + W) times the logits with the label, minus W times those without; W = 0 is the label alone."""

    class Labelled(torch.nn.Module):
        def forward(self, x_t, t, y=None):
            value = torch.zeros(len(x_t), dtype=torch.float64) if y is None else y.double() + 1
            return torch.stack([value, -2 * value], dim=1)[:, :, None, None].expand(-1, -1, *x_t.shape[2:])

    d = make(2, model=Labelled())
    x_t, t, y = torch.zeros(2, 1, 1, 1, dtype=torch.long), torch.tensor([3, 4]), torch.tensor([0, 4])
    assert d.x_0_logits(x_t, t)[:, 0].flatten().tolist() == [0, 0]
    assert d.x_0_logits(x_t, t, y)[:, 0].flatten().tolist() == [1, 5]
    assert d.x_0_logits(x_t, t, y, guidance=2.0)[:, 0].flatten().tolist() == [3, 15]
    p = d.p_theta(x_t, t, d.x_0_logits(x_t, t, y, 2.0))
    w = torch.tensor([[3.0, -6], [15, -30]], dtype=torch.float64).softmax(1)[:, :, None, None]
    assert torch.equal(p, d.q_posterior(x_t, w, t))
    labels = torch.tensor([0, 4, 2, 1, 0])
    whole = d.sample(5, shape=(1, 4, 4), y=labels, guidance=1.0)
    assert torch.equal(whole, d.sample(5, shape=(1, 4, 4), y=labels, guidance=1.0, batch_size=2))


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_reverse_process_yields_every_step():
    d = make(2, 7)
    chain = list(d.reverse_process(3, shape=(1, 4, 6)))
    assert len(chain) == 8
    assert all(x.shape == (3, 1, 4, 6) and x.dtype == torch.int64 and x.max() <= 1 for x in chain)


def test_images_have_random_streams_of_their_own():
    """Image i depends on (seed, i) alone: not on n, the batch size or where a run starts. Seeds share no image."""
    d = make(2, 5)
    sheet = d.sample(7, seed=0, shape=(1, 8, 8))
    assert sheet.shape == (7, 1, 8, 8) and sheet.dtype == torch.uint8
    assert torch.equal(d.sample(7, seed=0, batch_size=3, shape=(1, 8, 8)), sheet)
    assert torch.equal(d.sample(2, seed=0, first=4, shape=(1, 8, 8)), sheet[4:6])
    torch.manual_seed(5)  # the global generator plays no part
    assert torch.equal(d.sample(3, seed=0, shape=(1, 8, 8)), sheet[:3])
    everything = torch.cat([d.sample(40, seed=s, shape=(1, 8, 8)) for s in range(3)]).flatten(1)
    assert len(everything.unique(dim=0)) == 120


def test_samples_of_a_perfect_network_follow_the_data():
    chain = exact_chain("2x2", 2, T=48)
    x_0 = chain.d.sample(3000, batch_size=500, shape=chain.shape).flatten(1)
    codes = (x_0.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    np.testing.assert_allclose(torch.bincount(codes, minlength=16) / 3000, chain.final_distribution(), atol=0.03)
    truth = np.zeros(16)
    truth[[0b0000, 0b1100, 0b1010, 0b1111, 0b1001]] = chain.probs
    np.testing.assert_allclose(chain.final_distribution(), truth, atol=0.02)


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"n": 1, "batch_size": 0}, {"n": 1, "seed": -1}, {"n": 1, "first": -1}])
def test_sample_refuses_bad_numbers(kwargs):
    with pytest.raises(ValueError):
        make(2, 2).sample(**kwargs)
