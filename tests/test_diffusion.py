"""The mathematics, against enumeration and closed forms that share no code with diffusion.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffusion import SCHEDULES, DiscreteDiffusion, draw, kl_divergence

K_AND_SCHEDULE = [(2, "cosine"), (3, "cosine"), (5, "cosine"), (2, "linear"), (3, "linear")]


def make(K=2, T=20, schedule="cosine", model=None, cls=DiscreteDiffusion, **kwargs):
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
@pytest.mark.parametrize("K, schedule", K_AND_SCHEDULE)
def test_matrices(K, schedule):
    """Shapes, float64, identity at 0, rows summing to one; bar_Q is the product and has the uniform closed form."""
    T = 50
    d = make(K, T, schedule)
    assert d.Q.shape == d.bar_Q.shape == (T + 1, K, K)
    assert d.Q.dtype == d.bar_Q.dtype == torch.float64
    assert torch.equal(d.Q[0], torch.eye(K, dtype=torch.float64)) and torch.equal(d.bar_Q[0], d.Q[0])
    for matrix in (d.Q, d.bar_Q):
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-14)
    product, alpha_bar = np.eye(K), 1.0
    for t in range(1, T + 1):
        beta = SCHEDULES[schedule](T)[t - 1].item()
        product, alpha_bar = product @ d.Q[t].numpy(), alpha_bar * (1 - beta)
        np.testing.assert_allclose(d.bar_Q[t], product, atol=1e-13)
        np.testing.assert_allclose(d.bar_Q[t], alpha_bar * np.eye(K) + (1 - alpha_bar) / K, atol=1e-13)


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


CHI_SQUARE_LIMIT = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5}  # exceeded by chance once in 10,000, by degrees of freedom


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("t", [1, 7, 20])
def test_q_sample_frequencies(K, t):
    torch.manual_seed(K * 100 + t)
    d = make(K)
    for level in range(K):
        x_t = d.q_sample(torch.full((20, 1, 50, 50), level), torch.full((20,), t))
        counts = torch.bincount(x_t.flatten(), minlength=K)
        assert chi_square(counts, d.bar_Q[t, level] * x_t.numel()) < CHI_SQUARE_LIMIT[K - 1]


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
    for K in (2, 3, 5):
        d = make(K, 6)
        yield pytest.param(K, d.Q.numpy(), d.bar_Q.numpy(), id=f"uniform-{K}")
        yield pytest.param(K, *random_chain(K, K, 6), id=f"random-{K}")
        yield pytest.param(K, *random_chain(K, K + 2, 6, zeros=True), id=f"zeros-{K}")
        yield pytest.param(K, *absorbing_chain(K, 6), id=f"absorbing-{K}")


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


class JointForm(DiscreteDiffusion):
    """Equation 4 with a cross-entropy network: q(x_{t-1}, x_t | x_0) p(x_0 | x_t), normalised at the end."""

    def q_posterior(self, x_t, x_0_probs, t):
        likelihood = self.bar_Q[t][:, : self.num_classes].gather(
            2, x_t.flatten(1)[:, None].expand(-1, self.num_classes, -1)
        )
        reweighted = x_0_probs * likelihood.view_as(x_0_probs)
        return super().q_posterior(x_t, reweighted / reweighted.sum(1, keepdim=True), t)


class Argmax(DiscreteDiffusion):
    """The single most probable x_0, and its posterior."""

    def p_theta(self, x_t, t):
        best = self.model(x_t, t).argmax(1)
        return self.q_posterior(x_t, torch.nn.functional.one_hot(best, self.num_classes).movedim(-1, 1).double(), t)


def toy(name, K):
    """images [N, D], probs [N], shape. One pixel with P(x_0 = 1) = 0.1, or correlated 2x2 images."""
    if name == "pixel":
        probs = {2: [0.9, 0.1], 3: [0.6, 0.1, 0.3]}[K]
        return np.arange(K)[:, None], np.array(probs), (1, 1, 1)
    images = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [K - 1, 0, 0, K - 1]])
    return images, np.array([0.3, 0.25, 0.2, 0.15, 0.1]), (1, 2, 2)


class ExactChain:
    """A toy data set, the perfect network for it, and every state x of the image space."""

    def __init__(self, name, K=2, T=20, schedule="cosine", Q=None, cls=DiscreteDiffusion):
        self.images, self.probs, self.shape = toy(name, K)
        reference = make(K, T, schedule, Q=None if Q is None else torch.from_numpy(Q))
        self.bar_Q, self.Q = reference.bar_Q.numpy(), reference.Q.numpy()
        model = ExactPosterior(self.images, self.probs, self.bar_Q)
        self.d = make(K, T, schedule, model=model, cls=cls, Q=None if Q is None else torch.from_numpy(Q))
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


EXACT = [("uniform", 2, None), ("uniform", 3, None), ("absorbing", 2, "absorbing"), ("random", 2, "random")]


def exact_chain(name, K, kind, T=20, **kwargs):
    Q = {None: None, "absorbing": absorbing_chain(K, T)[0], "random": random_chain(K, K, T)[0]}[kind]
    return ExactChain(name, K, T, Q=Q, **kwargs)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("label, K, kind", EXACT)
def test_one_pixel_returns_the_data_distribution(label, K, kind):
    chain = exact_chain("pixel", K, kind)
    expected = np.zeros(len(chain.states))
    expected[:K] = chain.probs
    np.testing.assert_allclose(chain.final_distribution(), expected, atol=1e-9)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("label, K, kind", EXACT)
def test_one_pixel_bound_is_the_entropy(label, K, kind):
    chain = exact_chain("pixel", K, kind)
    base, gap = chain.theory()
    assert gap == pytest.approx(0, abs=1e-9)
    assert chain.mean_bound() == pytest.approx(base, abs=1e-6 if kind == "random" else 1e-9)


@pytest.mark.filterwarnings("ignore:bar_Q")
@pytest.mark.parametrize("label, K, kind", EXACT)
def test_2x2_bound_is_what_theory_says(label, K, kind):
    """The mean bound exceeds the entropy by the prior's and the factorization's divergence, and by nothing else."""
    chain = exact_chain("2x2", K, kind, T=6)
    base, gap = chain.theory()
    assert gap > 1e-4
    assert chain.mean_bound() == pytest.approx(base + gap, abs=1e-9)


@pytest.mark.parametrize("kind", [None, "absorbing"])
def test_factorization_gap_shrinks_with_T(kind):
    gaps = [exact_chain("2x2", 2, kind, T=T).theory()[1] for T in (3, 12, 48)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


@pytest.mark.parametrize("cls", [JointForm, Argmax])
def test_the_wrong_reverse_steps_fail_the_exactness_tests(cls):
    """The tests above can tell: with the joint form or the argmax, chain and bound are both far off."""
    pixel = exact_chain("pixel", 2, None, cls=cls)
    assert abs(pixel.final_distribution()[1] - 0.1) > 1e-3
    assert pixel.mean_bound() > sum(pixel.theory()) + 1e-2
    square = exact_chain("2x2", 2, None, T=6, cls=cls)
    assert square.mean_bound() > sum(square.theory()) + 1e-2


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
    chain = ExactChain("pixel", 2, 200, schedule, cls=cls)
    distribution = chain.d.prior.numpy()
    for t in range(200, 0, -1):
        distribution = distribution @ chain.reverse_kernel(t)
    assert distribution[1] == pytest.approx(expected, abs=5e-5)


# -- bound and loss as they are called in practice --------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 1, 3])
def test_variational_bound_is_unbiased(samples):
    """The random estimates agree with the enumerated mean of the one-pixel chain within 4 standard errors."""
    chain = exact_chain("pixel", 2, None, T=8)
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
    chain = exact_chain("2x2", 2, None, T=48)
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
