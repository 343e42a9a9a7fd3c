"""Small chains to enumerate in numpy, and networks for them. Contains no tests."""

import itertools
from itertools import pairwise

import numpy as np
import torch

from diffusion import DiscreteDiffusion
from trajectories import respaced

# All legal combinations; test_transitions.py compares transitions.FAMILIES with them.
LEGAL = [
    (transition, schedule, K)
    for transition, schedules, Ks in [
        ("uniform", ("cosine", "linear", "mutual_info"), (2, 3, 5)),
        ("absorbing", ("mutual_info", "cosine"), (2, 3, 5)),
        ("gaussian", ("cosine", "fitted"), (3, 5)),
    ]
    for schedule in schedules
    for K in Ks
]


class Constant(torch.nn.Module):
    """A network that knows nothing: constant float64 logits. `seen` is its last input."""

    def __init__(self, K, logits=None):
        super().__init__()
        self.logits = torch.zeros(K, dtype=torch.float64) if logits is None else logits

    def forward(self, x_t, t):
        self.seen = x_t, t
        return self.logits.view(1, -1, 1, 1).expand(len(x_t), -1, *x_t.shape[2:])


class Labelled(torch.nn.Module):
    """A network for five labels: logits (y + 1, -2 (y + 1)), or zeros without a label."""

    num_labels = 5

    def forward(self, x_t, t, y=None):
        self.seen = y
        value = torch.zeros(len(x_t), dtype=torch.float64) if y is None else y.double() + 1
        return torch.stack([value, -2 * value], dim=1)[:, :, None, None].expand(
            -1, -1, *x_t.shape[2:]
        )


def make(K=2, T=20, schedule=None, model=None, **kwargs):
    return DiscreteDiffusion(
        model or Constant(K), num_levels=K, timesteps=T, schedule=schedule, **kwargs
    )


# --------------------------------------------------------------------------------------------------
# Transition matrices independent of the product, float64 numpy [T+1, S, S], and their products


def products(Q):
    bar_Q = [np.eye(Q.shape[-1])]
    for matrix in Q[1:]:
        bar_Q.append(bar_Q[-1] @ matrix)
    return np.stack(bar_Q)


def random_chain(K, S, T, seed=0, zeros=False):
    """Transition matrices without any structure."""
    rng = np.random.default_rng(seed)
    Q = rng.random((T + 1, S, S)) + 0.05
    if zeros:
        Q[:, rng.random((S, S)) < 0.4] = 0
        Q += np.eye(S)
    Q /= Q.sum(-1, keepdims=True)
    Q[0] = np.eye(S)
    return Q, products(Q)


def absorbing_chain(K, T):
    """Levels 0..K-1 and an absorbing mask K; all masked at T. Has many exact zeros."""
    Q = np.stack([np.eye(K + 1)] * (T + 1))
    for t in range(1, T + 1):
        beta = 1 / (T - t + 1)
        Q[t] *= 1 - beta
        Q[t][:, K] += beta
    return Q, products(Q)


def two_masks_chain(K, T):
    """Two extra states: levels turn into the first mask, the first into the second."""
    Q = np.stack([np.eye(K + 2)] * (T + 1))
    for t in range(1, T + 1):
        lost = 1 if t == T else 0.3
        Q[t, :K] *= 1 - lost
        Q[t, :K, K + (t == T)] += lost
        Q[t, K] = 0
        Q[t, K, [K, K + 1]] = 1 - lost, lost
    return Q, products(Q)


# --------------------------------------------------------------------------------------------------
# A perfect network and its consequences


class ExactPosterior(torch.nn.Module):
    """log p(x_0^i | x_t) of each pixel i, by enumeration: the optimum of cross-entropy."""

    def __init__(self, images, probs, bar_Q):
        super().__init__()
        self.images, self.probs, self.bar_Q = (
            images,
            probs,
            bar_Q,
        )  # [N, D] levels, [N], [T+1, S, S]; numpy

    def forward(self, x_t, t):
        K = self.images.max() + 1
        flat = x_t.flatten(1).numpy()
        # likelihood[b, n] = product over pixels of bar_Q_t[image_n[i], x_t[b, i]]
        likelihood = np.prod(
            self.bar_Q[t.numpy()[:, None, None], self.images[None], flat[:, None]], axis=-1
        )
        posterior = likelihood * self.probs
        posterior = posterior / np.maximum(posterior.sum(1, keepdims=True), 1e-300)
        pixel = np.stack([posterior @ (self.images == k) for k in range(K)], axis=1)  # [B, K, D]
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(pixel).reshape(len(flat), K, *x_t.shape[2:]))


def toy(name, K):
    """images [N, D], probs [N], image_shape: one pixel, or correlated 2x2 images."""
    if name == "pixel":
        probs = {2: [0.9, 0.1], 3: [0.6, 0.1, 0.3]}[K]
        return np.arange(K)[:, None], np.array(probs), (1, 1, 1)
    images = np.array(
        [[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [K - 1, 0, 0, K - 1]]
    )
    return images, np.array([0.3, 0.25, 0.2, 0.15, 0.1]), (1, 2, 2)


class ExactChain:
    """A toy data set, its perfect network, and every state x of the image space."""

    def __init__(self, name, K=2, T=20, kept=None, **kwargs):
        self.images, self.probs, self.shape = toy(name, K)
        kwargs["image_shape"] = self.shape
        own = {"random": random_chain(K, K, T), "two masks": two_masks_chain(K, T)}.get(
            kwargs.get("Q")
        )
        if own:
            kwargs["Q"] = torch.from_numpy(own[0])
        reference = make(K, T, **kwargs)
        self.bar_Q, self.Q = reference.bar_Q.numpy(), reference.Q.numpy()
        self.d = make(K, T, model=ExactPosterior(self.images, self.probs, self.bar_Q), **kwargs)
        if kept is not None:  # the network still takes the T original timesteps
            self.d, T = respaced(self.d, kept), len(kept)
            identity = np.eye(self.Q.shape[-1])
            steps = [
                products(np.stack([identity, *self.Q[a + 1 : b + 1]]))[-1]
                for a, b in pairwise([0, *kept])
            ]
            self.Q, self.bar_Q = np.stack([identity, *steps]), self.bar_Q[[0, *kept]]
        self.T, D, S = T, self.images.shape[1], self.Q.shape[-1]
        self.states = np.array(list(itertools.product(range(S), repeat=D)))  # [N, D]

    def likelihood(self, t):
        """q(x_t | x_0) for every data image and every state, [images, states]."""
        return np.prod(self.bar_Q[t][self.images[:, None], self.states[None]], axis=-1)

    def marginal(self, t):
        return self.probs @ self.likelihood(t)

    def reverse_kernel(self, t):
        """p_theta between all states, [x_t, x_{t-1}]; zero where x_t is impossible."""
        possible = self.marginal(t) > 0
        x_t = torch.from_numpy(self.states[possible]).view(-1, *self.shape)
        p = self.d.p_theta(x_t, torch.full((len(x_t),), t)).flatten(2).numpy()  # [N, S, D]
        kernel = np.zeros((len(self.states),) * 2)
        kernel[possible] = np.prod([p[:, self.states[:, i], i] for i in range(p.shape[2])], axis=0)
        return kernel

    def final_distribution(self):
        """The distribution of x_0 if the reverse process starts from the true q(x_T)."""
        distribution = self.marginal(self.T)
        for t in range(self.T, 0, -1):
            distribution = distribution @ self.reverse_kernel(t)
        return distribution

    def mean_terms(self):
        """The expected L_T, sum of L_{t-1} over t = 2..T, and L_0 of the class."""
        terms = np.zeros(self.T + 1)
        for n, (image, prob) in enumerate(zip(self.images, self.probs, strict=True)):
            x_0 = torch.from_numpy(image).view(1, *self.shape)
            terms[0] += prob * self.d.L_T(x_0).item()
            for t in range(1, self.T + 1):
                weights = self.likelihood(t)[n]
                x_t = torch.from_numpy(self.states[weights > 0]).view(-1, *self.shape)
                kl = self.d.L_t_minus_1(
                    x_0.expand(len(x_t), -1, -1, -1), x_t, torch.full((len(x_t),), t)
                )
                terms[t] += prob * (weights[weights > 0] @ kl.numpy())
        return terms[0], terms[2:].sum(), terms[1]

    def theory(self):
        """H(x_0) + KL(q(x_T) || prior); sum over t of E KL(q(x_{t-1} | x_t) || its marginals)."""
        entropy = -(self.probs * np.log(self.probs)).sum()
        q_T, prior = self.marginal(self.T), np.prod(self.d.prior.numpy()[self.states], axis=-1)
        seen = q_T > 0
        prior_gap = (q_T[seen] * np.log(q_T[seen] / prior[seen])).sum()
        factorization_gap = 0.0
        D, S = self.states.shape[1], self.Q.shape[-1]
        for t in range(1, self.T + 1):
            step = np.prod(
                self.Q[t][self.states[:, None], self.states[None]], axis=-1
            )  # [x_{t-1}, x_t]
            joint = self.marginal(t - 1)[:, None] * step
            for column in joint.T[joint.sum(0) > 0]:
                conditional = column / column.sum()
                product = np.ones(len(self.states))
                for i in range(D):
                    pixel = np.array([conditional[self.states[:, i] == s].sum() for s in range(S)])
                    product *= pixel[self.states[:, i]]
                on = conditional > 0
                factorization_gap += (
                    column.sum() * (conditional[on] * np.log(conditional[on] / product[on])).sum()
                )
        return entropy + prior_gap, factorization_gap


def brute_force_posterior(Q, bar_Q, t, x_t, w):
    """p(x_{t-1} | x_t) under w(x_0): Bayes' rule, summed over every (x_0, x_{t-1})."""
    S, K = Q.shape[-1], len(w)
    possible = [x_0 for x_0 in range(K) if bar_Q[t][x_0, x_t] > 0]
    mass = sum(w[x_0] for x_0 in possible)
    result = np.zeros(S)
    for x_0 in possible:
        joint = np.array(
            [bar_Q[t - 1][x_0, x_before] * Q[t][x_before, x_t] for x_before in range(S)]
        )
        result += w[x_0] / mass * joint / joint.sum()
    return result


class RandomNetwork(torch.nn.Module):
    """Arbitrary logits for every (x_t, t) of a two-pixel image."""

    def __init__(self, K, S, T):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = 2 * torch.randn(T + 1, S, S, K, 1, 2, dtype=torch.float64, generator=g)

    def forward(self, x_t, t):
        return self.table[t, x_t[:, 0, 0, 0], x_t[:, 0, 0, 1]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
