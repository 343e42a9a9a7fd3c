"""Discrete denoising diffusion: D3PM, Austin et al. 2021 (arXiv:2107.03006), to be read beside sections 2 and 3.

Conventions
    x_0   clean images, integers [B, 1, H, W] in 0..K-1 (K = num_classes grey levels)
    x_t   noisy images, integers [B, 1, H, W] in 0..S-1 (S states of the chain; every level is a state, so S >= K)
    t     integers [B] in 1..T; t = 0 is clean data, t = T is noise
    distributions over x_0 are float [B, K, H, W], over x_t float [B, S, H, W]; the class axis comes second

Every pixel walks through the same Markov chain on its own; only the network looks at the whole image.
Any integer dtype is accepted for images and t. Probabilities keep the dtype of the network's output.
"""

import io
import math
import os
import tempfile
import warnings
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import build_network

IMAGE_SHAPE = (1, 32, 32)
# What the scripts use where no checkpoint is named
RELEASED = Path(__file__).resolve().parent / "results_d3pm" / "released" / "d3pm_mnist.pth"

# ---------------------------------------------------------------------------------------------------------------------
# Noise schedules: beta_1 .. beta_T as a float64 tensor [T] (section 3.2)


def cosine_betas(T: int, K: int) -> Tensor:
    """alpha_bar_t = cos((t/T + s) / (1 + s) * pi/2), s = 0.008, and beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}.

    The paper's schedule for uniform transitions (after Hoogeboom et al. 2021): the cosine, not its square. It is
    not clipped, so beta_T = 1: x_T is exactly stationary and L_T = 0.
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2)
    alpha_bar[T] = 0.0  # cos(pi/2), which floating point puts at 6e-17
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def linear_betas(T: int, K: int) -> Tensor:
    """1e-4 .. 0.02, evenly spaced: the DDPM schedule that is widely copied.

    With T = 200 it stops halfway: bar_Q_T = [[0.57, 0.43], [0.43, 0.57]] for two uniform levels, so the sampler starts
    from noise that the network never saw and L_T alone costs 9.0 nats per 32x32 image. Kept for comparison.
    """
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def mutual_info_betas(T: int, K: int) -> Tensor:
    """beta_t = 1 / (T - t + 1), so alpha_bar_t = 1 - t/T: the same share of the pixels is lost at every step.

    For absorbing transitions the mutual information between x_t and x_0 then falls linearly (appendix A.7); for others
    the name is only a name.
    """
    return 1 / (T - torch.arange(T, dtype=torch.float64))


def gaussian_betas(T: int, K: int) -> Tensor:
    """Evenly spaced squared widths for Gaussian transitions, with end points that fit K and T.

    beta_1 lets a middle level go in the first step with probability 0.001; beta_T is found by bisection so that every
    row of bar_Q_T is within 1e-4 (total variation) of uniform. The paper's 1e-4 .. 0.02 are made for K = 256 and
    T = 1000: with few levels the kernel is then so narrow that next to nothing ever moves.

    Raises:
        ValueError: if no width reaches uniform in T steps.
    """
    beta_1 = 4 / ((K - 1) ** 2 * math.log(2 / 0.001))

    def betas(beta_T: float) -> Tensor:
        return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)

    def distance(beta_T: float) -> float:
        bar_Q_T = reduce(torch.matmul, gaussian_transitions(K, betas(beta_T)))
        return 0.5 * (bar_Q_T - 1 / K).abs().sum(-1).max().item()

    low, high = math.log(beta_1), math.log(1e4)
    if distance(math.exp(high)) > 1e-4:
        raise ValueError(f"gaussian transitions can't reach noise in {T} timesteps: take more")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(math.exp(middle)) > 1e-4 else (low, middle)
    return betas(math.exp(high))


# ---------------------------------------------------------------------------------------------------------------------
# Transition families: Q_1 .. Q_T as a float64 tensor [T, S, S] with Q[i, j] = q(x_t = j | x_{t-1} = i) (appendix A.2)


def uniform_transitions(K: int, betas: Tensor) -> Tensor:
    """Q_t = (1 - beta_t) I + beta_t / K 11^T: with probability beta_t, draw the level anew (appendix A.2.1). S = K."""
    beta = betas[:, None, None]
    return (1 - beta) * torch.eye(K, dtype=torch.float64) + beta / K


def absorbing_transitions(K: int, betas: Tensor) -> Tensor:
    """Q_t = (1 - beta_t) I + beta_t 1 e_m^T: with probability beta_t, become the mask m (appendix A.2.2). S = K + 1.

    The mask is a state of its own, the last one, and a pixel that shows a level has always shown it. (The authors'
    image code absorbs into the middle grey level instead.)

    Raises:
        ValueError: if a pixel can survive to T, where the prior is all mask: L_T would be infinite.
    """
    if betas.max() < 1:
        raise ValueError("absorbing transitions need a schedule that ends with every pixel masked (some beta_t = 1)")
    beta = betas[:, None, None]
    mask = F.one_hot(torch.tensor(K), K + 1).double()
    return (1 - beta) * torch.eye(K + 1, dtype=torch.float64) + beta * mask


def gaussian_transitions(K: int, betas: Tensor) -> Tensor:
    """Discretized Gaussian kernel for ordinal levels, doubly stochastic (appendix A.2.3). S = K.

    Q_t[i, j] = exp(-4 |i - j|^2 / ((K - 1)^2 beta_t)) / sum over n = -(K-1)..K-1 of exp(-4 n^2 / ((K - 1)^2 beta_t))
    for i != j, and the diagonal takes the rest.

    Raises:
        ValueError: for K = 2, where a symmetric kernel is the uniform one.
    """
    if K == 2:
        raise ValueError("gaussian transitions between 2 levels are uniform transitions in disguise: use those")
    levels = torch.arange(K, dtype=torch.float64)
    n = torch.arange(-(K - 1), K, dtype=torch.float64)
    width = (K - 1) ** 2 * betas[:, None, None] / 4
    Q = torch.exp(-((levels[:, None] - levels) ** 2) / width) / torch.exp(-(n**2) / width).sum(-1, keepdim=True)
    Q.diagonal(dim1=-2, dim2=-1).zero_()
    Q.diagonal(dim1=-2, dim2=-1).copy_(1 - Q.sum(-1))
    return Q


# The legal combinations: each family with its schedules, the default one first.
TRANSITIONS = {
    "uniform": (
        uniform_transitions,
        {"cosine": cosine_betas, "linear": linear_betas, "mutual_info": mutual_info_betas},
    ),
    "absorbing": (absorbing_transitions, {"mutual_info": mutual_info_betas, "cosine": cosine_betas}),
    "gaussian": (gaussian_transitions, {"linear": gaussian_betas}),
}
SCHEDULES = ("cosine", "linear", "mutual_info")
LOSSES = ("cross_entropy", "variational", "hybrid")

# ---------------------------------------------------------------------------------------------------------------------


class DiscreteDiffusion(nn.Module):
    """The forward process, its reversal by a network, the bound, the loss and the sampler.

    Args:
        model: the network; `model(x_t, t)` returns logits of x_0, float [B, K, H, W].
        num_classes: K, the number of grey levels, at least 2.
        timesteps: T, at least 1.
        transition: name of a transition family (`TRANSITIONS`).
        schedule: name of a noise schedule that goes with it; None for the family's own.
        loss_type: what `loss` returns: "cross_entropy", "variational" or "hybrid".
        hybrid_weight: lambda of equation 5, the weight of the cross-entropy in the hybrid loss.
        Q: your own transition matrices [T+1, S, S] instead of a family and its schedule: Q[0] the identity, rows
            summing to one, S >= K; the first K states are the grey levels.
        network_t: int64 [T+1], what the network is told for t = 0..T; t itself by default. See `respaced`.

    Attributes:
        Q: float64 [T+1, S, S], Q[t][i, j] = q(x_t = j | x_{t-1} = i); Q[0] is the identity.
        bar_Q: float64 [T+1, S, S], bar_Q[t] = Q[1] Q[2] ... Q[t] (equation 3).
        prior: float64 [S], p(x_T), what sampling starts from: the mean over levels of q(x_T | x_0), which is the
            stationary distribution when the schedule reaches it.

    Raises:
        ValueError: for arguments out of range, unknown names, or matrices that are not transition matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int = 2,
        timesteps: int = 200,
        transition: str = "uniform",
        schedule: str | None = None,
        loss_type: str = "cross_entropy",
        hybrid_weight: float = 0.01,
        Q: Tensor | None = None,
        network_t: Tensor | None = None,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        if Q is not None:
            Q = check_transitions(Q, num_classes, timesteps)
        if loss_type not in LOSSES:
            raise ValueError(f"unknown loss {loss_type!r}: choose from {', '.join(LOSSES)}")
        if Q is None:
            if transition not in TRANSITIONS:
                raise ValueError(f"unknown transition {transition!r}: choose from {', '.join(TRANSITIONS)}")
            family, schedules = TRANSITIONS[transition]
            schedule = schedule or next(iter(schedules))
            if schedule not in schedules:
                raise ValueError(
                    f"{transition} transitions go with the schedule {' or '.join(schedules)}, not {schedule}"
                )
            steps = family(num_classes, schedules[schedule](timesteps, num_classes))
            Q = torch.cat([torch.eye(steps.shape[-1], dtype=torch.float64)[None], steps])
            self.config = {"transition": transition, "schedule": schedule}
        else:
            self.config = {"Q": Q}
        self.config |= {"loss_type": loss_type, "hybrid_weight": hybrid_weight}
        self.config |= {"num_classes": num_classes, "timesteps": timesteps}  # rebuilds this object around a network
        if network_t is not None:
            self.config["network_t"] = network_t
        self.model = model
        self.network_t = torch.arange(timesteps + 1) if network_t is None else network_t
        self.num_classes = num_classes
        self.num_states = Q.shape[-1]
        self.loss_type, self.hybrid_weight = loss_type, hybrid_weight
        self.timesteps = timesteps
        # Plain float64 tensors on the CPU rather than buffers: exact, small, and MPS has no float64. See `_at`.
        self.Q = Q
        self.bar_Q = self.Q.clone()
        for t in range(1, timesteps + 1):
            self.bar_Q[t] = self.bar_Q[t - 1] @ self.Q[t]
        self.bar_Q /= self.bar_Q.sum(-1, keepdim=True)  # keeps rounding from adding up over T products
        self.prior = self.bar_Q[timesteps, :num_classes].mean(0)

        distance = 0.5 * (self.bar_Q[timesteps, :num_classes] - self.prior).abs().sum(-1).max().item()
        if distance > 1e-3:
            warnings.warn(
                f"bar_Q[T] is far from stationary (total variation {distance:.3f}): sampling starts from a "
                "distribution that the forward process does not reach, so L_T > 0. Use another schedule or a larger T.",
                stacklevel=1,  # the same line for every chain, so that it is said once
            )

    def respaced(self, steps: int | list[int]) -> "DiscreteDiffusion":
        """The same process seen at fewer timesteps, around the same network: bound and sampler take fewer steps.

        Between kept timesteps, Q is the product of those that were skipped, so bar_Q at a kept timestep, and with it
        what the network was trained for, stays the same. The network is told the original t.

        Args:
            steps: how many steps, from 1 to T; or the timesteps to keep, in rising order up to T. A number is spread so
                that about as many pixels lose their value in each step, whatever the schedule.

        Raises:
            ValueError: for more steps than there are, or timesteps that are not such a list.
        """
        T = self.timesteps
        if isinstance(steps, int):
            if not 1 <= steps <= T:
                raise ValueError(f"the number of steps must be in 1..{T}, the timesteps of training, got {steps}")
            steps = self._spread(steps)
        kept = [0, *steps]
        if kept[-1] != T or any(a >= b for a, b in pairwise(kept)):
            raise ValueError(f"the timesteps to keep must rise from at least 1 to {T}")
        Q = [reduce(torch.matmul, self.Q[a + 1 : b + 1]) for a, b in pairwise(kept)]
        config = {key: value for key, value in self.config.items() if key not in ("transition", "schedule")}
        config |= {"timesteps": len(steps), "Q": torch.stack([self.Q[0], *Q]), "network_t": self.network_t[kept]}
        return type(self)(self.model, **config)

    def _spread(self, n: int) -> list[int]:
        """n different timesteps up to T, evenly spaced in the share of pixels that have lost their value, or nearly."""
        T, K = self.timesteps, self.num_classes
        changed = 1 - self.bar_Q[:, :K, :K].diagonal(dim1=1, dim2=2).mean(1)  # [T+1], the mean over levels
        kept = [0]
        for k in range(1, n + 1):
            nearest = int((changed - k / n * changed[T]).abs().argmin())
            kept.append(min(max(nearest, kept[-1] + 1), T - (n - k)))  # distinct, and room for those to come
        return [*kept[1:-1], T]

    # -- the forward process q ----------------------------------------------------------------------------------------

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table[t] for a batch of t, on the device and in the dtype of `like`."""
        return table[t.cpu().long()].to(like.device, like.dtype)

    def q_x_t(self, x_0: Tensor, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """q(x_t | x_0) = row x_0 of bar_Q_t (equation 3), float [B, S, H, W]; t may be 0."""
        bar_Q = self._at(self.bar_Q, t, torch.empty(0, dtype=dtype, device=x_0.device))
        return take_columns(bar_Q.mT, x_0)

    def q_sample(self, x_0: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) in one jump (equation 3), int64 [B, 1, H, W].

        `u` are the uniforms in [0, 1) that the draw is made from, float [B, 1, H, W]; fresh ones by default.
        """
        return draw(self.q_x_t(x_0, t), u)

    def q_posterior(self, x_t: Tensor, x_0_probs: Tensor, t: Tensor) -> Tensor:
        """The distribution of x_{t-1} given x_t under a distribution over x_0, float [B, S, H, W].

        The mixture of exact posteriors, sum over x_0 of q(x_{t-1} | x_t, x_0) w(x_0), with equation 3's

            q(x_{t-1} = j | x_t, x_0) = Q_t[j, x_t] bar_Q_{t-1}[x_0, j] / bar_Q_t[x_0, x_t],

        where w is `x_0_probs` ([B, K, H, W]) restricted to the levels that can have led to x_t and renormalised. For a
        network that outputs p(x_0 | x_t), which is what cross-entropy trains, this is the exact conditional of each
        pixel. The paper's equation 4 sums q(x_{t-1}, x_t | x_0) p(x_0 | x_t) instead and normalises at the end: that
        counts the likelihood q(x_t | x_0) twice.

        Raises:
            ValueError: if `x_0_probs` puts all its mass on levels from which x_t cannot be reached, or for t = 0.
        """
        if (t < 1).any():
            raise ValueError("t must be in 1..T: there is no step back from clean data")
        K = x_0_probs.shape[1]
        likelihood = take_columns(self._at(self.bar_Q, t, x_0_probs)[:, :K], x_t)  # q(x_t | x_0), [B, K, H, W]
        possible = likelihood > torch.finfo(likelihood.dtype).tiny ** 0.5  # below, the factors of the ratio underflow
        w = torch.where(possible, x_0_probs, 0.0)
        mass = w.sum(1, keepdim=True)
        if not (mass > 0).all():  # true of NaN, too
            raise ValueError("x_0_probs gives no probability to any level that can have led to x_t")
        w_over_likelihood = w / mass / torch.where(possible, likelihood, 1.0)
        bar_Q_before = self._at(self.bar_Q, t - 1, x_0_probs)[:, :K]
        mixed = torch.einsum("bkhw,bkj->bjhw", w_over_likelihood, bar_Q_before)
        return mixed * take_columns(self._at(self.Q, t, x_0_probs), x_t)

    # -- the reverse process p_theta ----------------------------------------------------------------------------------

    def x_0_logits(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, guidance: float = 0.0) -> Tensor:
        """The network's logits of x_0, [B, K, H, W], given labels y [B] (-1 for none) if any.

        Guidance W > 0 moves them away from those without a label: (1 + W) logits(y) - W logits (Ho and Salimans 2022).
        """
        t = self.network_t.to(t.device)[t.long()]
        if y is None:
            return self.model(x_t, t)
        if not guidance:
            return self.model(x_t, t, y)
        twice = x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, -1)])
        labelled, unlabelled = self.model(*twice).chunk(2)
        return labelled + guidance * (labelled - unlabelled)

    def p_theta(self, x_t: Tensor, t: Tensor, logits: Tensor | None = None) -> Tensor:
        """p_theta(x_{t-1} | x_t), float [B, S, H, W]: the one definition that loss, bound and sampler share.

        `logits` are those of x_0, by default the network's without labels.
        """
        logits = self.x_0_logits(x_t, t) if logits is None else logits
        return self.q_posterior(x_t, logits.softmax(1), t)

    def p_sample(self, x_t: Tensor, t: Tensor, u: Tensor | None = None, y=None, guidance: float = 0.0) -> Tensor:
        """One reverse step: draw x_{t-1} ~ p_theta(x_{t-1} | x_t), int64 [B, 1, H, W].

        `u` as in `q_sample`, `y` and `guidance` as in `x_0_logits`.
        """
        return draw(self.p_theta(x_t, t, self.x_0_logits(x_t, t, y, guidance)), u)

    # -- the objective ------------------------------------------------------------------------------------------------

    def loss(self, x_0: Tensor, t: Tensor | None = None, u: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The training objective, a scalar in nats per dimension; t is uniform on 1..T.

        cross_entropy   -log p_theta(x_0 | x_t), the second term of equation 5 on its own
        variational     T L_{t-1}, the first: an unbiased estimate of the bound, less the constant L_T
        hybrid          the first plus `hybrid_weight` times the second (equation 5)

        All three train the same p_theta, the mixture. Under equation 4 the optimum of the bound is another network: the
        leave-one-out posterior, p(x_0 | x_t) / q(x_t | x_0) normalised. The two forms agree where q(x_t | x_0) is the
        same for every possible x_0, so for absorbing transitions; elsewhere the hybrid loss of the joint form asks for
        two different outputs at once.

        Args:
            x_0: images, integers [B, 1, H, W].
            t, u: timesteps [B] and the uniforms of the noising [B, 1, H, W]; drawn unless they are given.
            y: labels, int64 [B], -1 for none; for networks that take labels.
        """
        t = self.draw_t(len(x_0)).to(x_0.device) if t is None else t
        x_t = self.q_sample(x_0, t, u)
        return self.loss_at(x_0, x_t, t, self.x_0_logits(x_t, t, y))

    def loss_at(self, x_0: Tensor, x_t: Tensor, t: Tensor, logits: Tensor) -> Tensor:
        """`loss` of logits of x_0, [B, K, H, W], that a network gave for x_t at t."""
        cross_entropy = F.cross_entropy(logits, x_0[:, 0].long())
        if self.loss_type == "cross_entropy":
            return cross_entropy
        variational = self.timesteps * self.L_t_minus_1(x_0, x_t, t, logits).mean() / x_0[0].numel()
        return variational if self.loss_type == "variational" else variational + self.hybrid_weight * cross_entropy

    def draw_t(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n timesteps, each uniform on 1..T but spread evenly over the batch to cut variance; int64 [n] on the CPU."""
        first = torch.rand((), generator=generator, dtype=torch.float64)
        position = (first + torch.randperm(n, generator=generator) / n) % 1
        return (position * self.timesteps).long().clamp(max=self.timesteps - 1) + 1

    # -- the variational bound (equation 1), in nats per image --------------------------------------------------------

    def L_T(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)), float [B]: what the prior costs; 0 when bar_Q[T] is stationary."""
        kl = kl_divergence(self.bar_Q[self.timesteps, : self.num_classes], self.prior[None], dim=1)  # per level, [K]
        return kl.to(x_0.device, torch.float32)[x_0.long()].sum((1, 2, 3))

    def L_t_minus_1(self, x_0: Tensor, x_t: Tensor, t: Tensor, logits: Tensor | None = None) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), float [B]: its mean over x_t ~ q(x_t | x_0) is L_{t-1}.

        At t = 1 this is L_0 = -log p_theta(x_0 | x_1), since q(x_0 | x_1, x_0) is certain. It is +inf where the
        reverse process rules out what the forward process can do. `logits` as in `p_theta`.
        """
        p = self.p_theta(x_t, t, logits)
        q = self.q_posterior(x_t, F.one_hot(x_0[:, 0].long(), self.num_classes).movedim(-1, 1).to(p), t)
        return kl_divergence(q, p, dim=1).sum((1, 2))

    @torch.no_grad()
    def variational_bound(self, x_0: Tensor, samples: int | None = None, generator=None) -> Tensor:
        """The negative bound L_T + sum over t = 2..T of L_{t-1} + L_0 >= -log p_theta(x_0), float [B].

        An unbiased estimate: each term is taken at one x_t ~ q(x_t | x_0).

        Args:
            x_0: images, [B, 1, H, W].
            samples: None for all T terms, or how many t to draw per image for an unbiased estimate of their sum.
            generator: a CPU generator that the t and the noise are drawn from.
        """
        B, T = len(x_0), self.timesteps
        if samples is None:
            ts, weight = [torch.full((B,), t) for t in range(1, T + 1)], 1.0
        else:
            ts, weight = self.draw_t(B * samples, generator).view(samples, B), T / samples
        total = self.L_T(x_0)
        for t in ts:
            t = t.to(x_0.device)
            u = torch.rand(x_0.shape, generator=generator).to(x_0.device)
            total = total + weight * self.L_t_minus_1(x_0, self.q_sample(x_0, t, u), t)
        return total

    # -- sampling -----------------------------------------------------------------------------------------------------

    def classes(self, n: int, first: int = 0) -> Tensor | None:
        """Labels for images first .. first + n - 1 that take turns, int64 [n]; None if the network takes no labels."""
        num_labels = getattr(self.model, "num_labels", 0)
        return torch.arange(first, first + n) % num_labels if num_labels else None

    @torch.no_grad()
    def reverse_process(self, n: int, seed: int = 0, first: int = 0, shape=IMAGE_SHAPE, y=None, guidance: float = 0.0):
        """Walk from noise to data: yields x_T, x_{T-1}, ..., x_0, each int64 [n, 1, H, W], T + 1 tensors in all.

        The n images are numbers first .. first + n - 1 of the endless sheet that `seed` stands for. Image i draws
        from a random stream of its own, derived from (seed, i), so it does not depend on n or on its neighbours.
        `y` and `guidance` as in `x_0_logits`.
        """
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        streams = [np.random.default_rng((seed, i)) for i in range(first, first + n)]
        y = None if y is None else y.to(device)

        def uniforms():
            return torch.from_numpy(np.stack([s.random(shape, dtype=np.float32) for s in streams])).to(device)

        x_t = draw(self.prior.float().to(device)[None, :, None, None].expand(n, -1, *shape[1:]), uniforms())
        yield x_t
        for t in range(self.timesteps, 0, -1):
            x_t = self.p_sample(x_t, torch.full((n,), t, device=device), uniforms(), y, guidance)
            yield x_t

    def sample(
        self,
        n: int,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        shape=IMAGE_SHAPE,
        y: Tensor | None = None,
        guidance: float = 0.0,
    ) -> Tensor:
        """Draw n images from the model: uint8 [n, 1, H, W] on the CPU.

        Any n takes the memory of one batch beside the result. See `reverse_process` for `seed` and `first`,
        `x_0_logits` for `guidance` and the labels `y`, int64 [n].

        Raises:
            ValueError: if n, batch_size, seed or first is out of range.
        """
        if n < 1 or batch_size < 1 or first < 0 or not 0 <= seed < 2**32:
            raise ValueError("n and batch_size must be at least 1, first at least 0, seed in 0..2^32-1")
        images = torch.empty(n, *shape, dtype=torch.uint8)
        total = n * (self.timesteps + 1)
        with tqdm(total=total, desc="sampling", unit="step", unit_scale=True, disable=not progress) as bar:
            for start in range(0, n, batch_size):
                batch = slice(start, min(start + batch_size, n))
                size = batch.stop - start
                labels = None if y is None else y[batch]
                for x_t in self.reverse_process(size, seed, first + start, shape, labels, guidance):
                    x_0 = x_t
                    bar.update(size)
                images[batch] = x_0.cpu()
        return images


# ---------------------------------------------------------------------------------------------------------------------
# The few operations on distributions that the equations above are made of


def take_columns(matrices: Tensor, x: Tensor) -> Tensor:
    """Column x of each image's matrix, pixel by pixel: matrices [B, R, S], x [B, 1, H, W] -> [B, R, H, W]."""
    B = len(x)
    index = x.long().view(B, 1, -1).expand(B, matrices.shape[1], -1)
    return matrices.gather(2, index).view(B, -1, *x.shape[2:])


def draw(probs: Tensor, u: Tensor | None = None) -> Tensor:
    """Sample from probs [B, S, H, W] by inverting the cumulative distribution at u [B, 1, H, W] -> int64 [B, 1, H, W].

    A state of probability exactly 0 is never drawn: u < 1 is scaled by the total, so rounding cannot push it past
    the last possible state.
    """
    u = torch.rand(len(probs), 1, *probs.shape[2:], device=probs.device) if u is None else u
    cumulative = probs.cumsum(1)
    return (u * cumulative[:, -1:] >= cumulative[:, :-1]).sum(1, keepdim=True)


def kl_divergence(q: Tensor, p: Tensor, dim: int) -> Tensor:
    """sum of q log(q / p) over `dim`, in nats: 0 log 0 = 0, and +inf where q > 0 = p.

    A q so small that its p can underflow (below 1e-19 in float32) counts as 0: its term is far below rounding.
    """
    counts = q > torch.finfo(q.dtype).tiny ** 0.5
    return (torch.xlogy(q, q) - q * torch.where(counts, p, 1.0).log()).sum(dim)


def check_transitions(Q: Tensor, K: int, T: int) -> Tensor:
    """Q as float64 on the CPU, or a ValueError that says why it is not a chain of T transition matrices."""
    try:
        Q = torch.as_tensor(Q).detach().to("cpu", torch.float64)
    except (TypeError, RuntimeError):
        raise ValueError("Q must be a tensor") from None
    if Q.ndim != 3 or Q.shape[0] != T + 1 or Q.shape[1] != Q.shape[2] or Q.shape[1] < K:
        raise ValueError(f"Q must be [timesteps + 1, S, S] = [{T + 1}, S, S] with S >= {K}, got {list(Q.shape)}")
    if (Q < 0).any() or not torch.allclose(Q.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-6):
        raise ValueError("Q must hold probabilities, each row summing to one")
    if not torch.equal(Q[0], torch.eye(Q.shape[1], dtype=torch.float64)):
        raise ValueError("Q[0] must be the identity (t = 0 is clean data)")
    return Q


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a dict of plain values and tensors that describes itself


@contextmanager
def atomic_write(path: str | Path):
    """Yield a binary file that becomes `path` when the block ends well; a failure leaves what was there before.

    Folders are made as needed and symbolic links followed. Raises OSError before the block if `path` can't be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically. Raises OSError (a full disk, no permission), leaving any older file intact."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict:
    """The dict that `save_checkpoint` wrote, on the CPU, read with `weights_only=True`.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the file system says.
        ValueError: if the file is damaged or is not a checkpoint of this repository.
    """
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types here, with pages of text
            raise ValueError(f"{path} is damaged or is not a checkpoint (torch.load: {type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not {"network", "diffusion", "averaged_weights"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this repository")
    return checkpoint


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", timesteps: int | None = None
) -> DiscreteDiffusion:
    """A ready `DiscreteDiffusion` in eval mode with the averaged weights, respaced to so many timesteps if given.

    Raises what `read_checkpoint` and `DiscreteDiffusion.respaced` raise.
    """
    checkpoint = read_checkpoint(path)
    try:
        diffusion = DiscreteDiffusion(build_network(checkpoint["network"]), **checkpoint["diffusion"])
        diffusion.model.load_state_dict(checkpoint["averaged_weights"])
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of the repository: {reason}") from None
    if timesteps is not None:
        diffusion = diffusion.respaced(timesteps)
    return diffusion.eval().to(device)
