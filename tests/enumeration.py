"""Small chains to sum over all trajectories, in numpy and without diffusion.py's mathematics."""

import itertools

import numpy as np
import torch

from diffusion import DiscreteDiffusion
from trajectories import respaced
from transitions import gaussian_transitions

NAMES = (
    "uniform-cosine",
    "uniform-mutual_info",
    "absorbing",
    "gaussian",
    "zeros",
    "respaced",
    "labels",
)


class TableNetwork(torch.nn.Module):
    """Arbitrary float32 logits for each x_t (D pixels in a row), t and label."""

    def __init__(self, K, S, T, D, num_labels=0):
        super().__init__()
        self.num_labels, self.D, self.S = num_labels, D, S
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(num_labels + 1, T + 1, S**D, K, 1, D, generator=generator)

    def forward(self, x_t, t, y=None):
        place = self.S ** torch.arange(self.D - 1, -1, -1)
        code = (x_t[:, 0, 0].cpu() * place).sum(1)
        return self.table[torch.full_like(t, -1) if y is None else y, t, code]


def random_chain(K, S, T):
    """Unstructured matrices with many zeros; every state can stay."""
    rng = np.random.default_rng(0)
    Q = rng.random((T + 1, S, S)) * (rng.random((T + 1, S, S)) < 0.6) + 0.2 * np.eye(S)
    Q[0] = np.eye(S)
    return torch.from_numpy(Q / Q.sum(-1, keepdims=True))


def small_chain(name, D=2):
    """A chain of three steps (respaced: of seven) by name."""
    T, K = (
        (7 if name == "respaced" else 3),
        (3 if name in ("gaussian", "uniform-mutual_info") else 2),
    )
    S = K + (name in ("absorbing", "zeros"))
    network = TableNetwork(K, S, T, D, num_labels=2 if name == "labels" else 0)
    kwargs = {"num_levels": K, "timesteps": T, "image_shape": (1, 1, D)}
    if name == "gaussian":  # three steps can't reach noise, so take wide kernels
        steps = gaussian_transitions(K, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        kwargs["Q"] = torch.cat([torch.eye(K, dtype=torch.float64)[None], steps])
    elif name == "zeros":
        kwargs["Q"] = random_chain(K, S, T)
    else:
        transition, _, schedule = name.partition("-")
        kwargs |= {
            "transition": "absorbing" if transition == "absorbing" else "uniform",
            "schedule": schedule or None,
        }
    d = DiscreteDiffusion(network, **kwargs)
    return respaced(d, [3, 6, 7]) if name == "respaced" else d


class Enumeration:
    """All states [N, D] and transition probabilities, given a label or guidance if any."""

    def __init__(self, d, D=2, y=None, guidance=0.0):
        self.d, self.D, self.y, self.guidance, self.T, self.K = (
            d,
            D,
            y,
            guidance,
            d.timesteps,
            d.num_levels,
        )
        S = d.num_states
        self.states = np.array(list(itertools.product(range(S), repeat=D)))
        self.Q, self.bar_Q = d.Q.numpy(), [np.eye(S)]
        for t in range(1, self.T + 1):
            self.bar_Q.append(self.bar_Q[-1] @ self.Q[t])
        self.prior = self.bar_Q[self.T][: self.K].mean(0)
        self.images = [n for n, state in enumerate(self.states) if max(state) < self.K]

    def posterior(self, t, x_t, w):
        """q(x_{t-1} | x_t) of a pixel, [S], under w(x_0), by Bayes' rule for each x_0."""
        mixed, mass = np.zeros(len(self.prior)), 0.0
        for x_0 in range(self.K):
            if self.bar_Q[t][x_0, x_t] > 0:
                joint = self.bar_Q[t - 1][x_0] * self.Q[t][:, x_t]
                mixed, mass = mixed + w[x_0] * joint / joint.sum(), mass + w[x_0]
        return mixed / mass

    def reachable(self, t):
        return [
            n
            for n, state in enumerate(self.states)
            if all(self.bar_Q[t][: self.K, s].max() > 0 for s in state)
        ]

    def kernel(self, t, known=None):
        """p(x_{t-1} | x_t) between states, [x_t, x_{t-1}]; zero where x_t is impossible.

        The pixels of `known` that are not -1 follow the forward process towards them.
        """
        kernel = np.zeros((len(self.states),) * 2)
        for n in self.reachable(t):
            x_t, time = torch.from_numpy(self.states[n])[None, None, None], self.d.network_t[[t]]
            scores = unlabelled = self.d.model(x_t, time)[0, :, 0].double().numpy()
            if self.y is not None:
                scores = self.d.model(x_t, time, torch.tensor([self.y]))[0, :, 0].double().numpy()
            scores = scores + self.guidance * (scores - unlabelled)
            w = np.exp(scores) / np.exp(scores).sum(0)
            rows = []
            for i, s in enumerate(self.states[n]):
                given = known is not None and known[i] >= 0
                if given and self.bar_Q[t][known[i], s] == 0:
                    break  # it can't reach the given pixel
                rows.append(self.posterior(t, s, np.eye(self.K)[known[i]] if given else w[:, i]))
            else:
                kernel[n] = np.prod([row[self.states[:, i]] for i, row in enumerate(rows)], axis=0)
        return kernel

    def start(self, known=None):
        """p(x_T), [N], with the pixels of `known` drawn from q(x_T | x_0)."""
        given = [known is not None and known[i] >= 0 for i in range(self.D)]
        rows = [self.bar_Q[self.T][known[i]] if given[i] else self.prior for i in range(self.D)]
        return np.prod([row[self.states[:, i]] for i, row in enumerate(rows)], axis=0)

    def law(self, known=None):
        """The distribution of x_0, [N], of the model, or of overwriting `known` pixels."""
        p = self.start(known)
        for t in range(self.T, 0, -1):
            p = p @ self.kernel(t, known)
        return p

    def walks(self, known):
        """All possible trajectories towards `known`, [n, T+1] state indices; their q; their p / q.

        Both p and q are the model's at pixels that are not given.
        """
        p_0, q_0 = self.start(), self.start(known)
        walks = [([n], p_0[n], q_0[n]) for n in range(len(self.states)) if q_0[n] > 0]
        for t in range(self.T, 0, -1):
            p, q = self.kernel(t), self.kernel(t, known)
            walks = [
                ([*path, m], a * p[path[-1], m], b * q[path[-1], m])
                for path, a, b in walks
                for m in np.nonzero(q[path[-1]])[0]
            ]
        paths, p, q = (np.array(column) for column in zip(*walks, strict=True))
        return paths, q, p / q


# Exceeded by chance once in 10,000; by degrees of freedom
LIMITS = {0: 1e-9, 1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 7: 29.9, 8: 31.8}


def chi_square(counts, probs):
    """Pearson's statistic. Fails if an impossible state occurs."""
    counts, expected = np.asarray(counts, float), np.asarray(probs, float) * float(sum(counts))
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    return ((counts - expected)[seen] ** 2 / expected[seen]).sum()


def fits(counts, probs):
    """Whether the counts are plausible for these probabilities."""
    return chi_square(counts, probs) < LIMITS[np.count_nonzero(probs) - 1]
