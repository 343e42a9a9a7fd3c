"""The Markov chain of one pixel: noise schedules, transition matrices, and operations on them.

    beta_1 .. beta_T   float64 [T], how much noise each step adds
    Q_1 .. Q_T         float64 [T, S, S], Q_t[i, j] = q(x_t = j | x_{t-1} = i), for S states

Austin et al. 2021, section 3.1 and appendix A.2. A new family is a function that returns
Q_1 .. Q_T, and one entry in `FAMILIES`.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOG_ZERO = -1e30  # log 0 inside sums, where -inf would turn gradients into NaN
LOG_WIDEST = math.log(1e4)  # log of a beta at which a Gaussian kernel is flat

# -- noise schedules: (T, K) -> beta_1 .. beta_T, float64 [T] --------------------------------------


def cosine_betas(T: int, K: int) -> Tensor:
    """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, alpha_bar_t = cos((t/T + s) / (1 + s) pi/2).

    The paper's schedule for uniform transitions (Hoogeboom et al. 2021), s = 0.008: the cosine,
    not its square. It is not clipped, so beta_T = 1, x_T is exactly stationary and L_T = 0.
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2)
    alpha_bar[T] = 0.0  # cos(pi/2), which floating point puts at 6e-17
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def linear_betas(T: int, K: int) -> Tensor:
    """1e-4 .. 0.02, evenly spaced: the schedule of DDPM, for comparison. With T = 200 it stops
    short of noise, at bar_Q_T = [[0.57, 0.43], [0.43, 0.57]]: L_T is 9.0 nats per 32x32 image."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def mutual_info_betas(T: int, K: int) -> Tensor:
    """beta_t = 1 / (T - t + 1), so alpha_bar_t = 1 - t/T. With absorbing transitions the mutual
    information of x_t and x_0 then falls linearly (appendix A.7)."""
    return 1 / (T - torch.arange(T, dtype=torch.float64))


def fitted_betas(T: int, K: int) -> Tensor:
    """Evenly spaced squared widths for Gaussian transitions, with end points that fit K and T.

    beta_1 moves a middle level in the first step with probability 0.001. beta_T brings every row
    of bar_Q_T within 1e-4 (total variation) of uniform; a ValueError if T is too small. The
    paper's 1e-4 .. 0.02 suit K = 256 and T = 1000: with few levels hardly any pixel would move.
    """
    beta_1 = 4 / ((K - 1) ** 2 * math.log(2 / 0.001))

    def betas(log_beta_T: float) -> Tensor:
        return torch.linspace(beta_1, math.exp(log_beta_T), T, dtype=torch.float64)

    def distance(log_beta_T: float) -> float:
        row = torch.eye(K, dtype=torch.float64)[0]  # the slowest level to become uniform
        for beta in betas(log_beta_T).split(1):
            row = row @ gaussian_transitions(K, beta)[0]
        return 0.5 * (row - 1 / K).abs().sum().item()

    if distance(LOG_WIDEST) > 1e-4:
        raise ValueError(f"gaussian transitions can't reach noise in {T} timesteps: take more")
    return betas(bisect(distance, 1e-4, math.log(beta_1), LOG_WIDEST, 40))


def information_betas(T: int, K: int) -> Tensor:
    """Squared widths of Gaussian transitions for a mutual information that falls as a cosine.

    The mutual information of x_t and x_0, for K equally likely levels and divided by log K, is
    cos^2(pi/2 t/T), approximately. Evenly spaced widths lose half of it in a tenth of the steps
    for K = 8, in a fiftieth for K = 256. The last 12 steps are as wide as possible; a ValueError
    if T is too small for that.
    """
    if T <= 12:
        raise ValueError(f"gaussian transitions can't reach noise in {T} timesteps: take more")

    def step(log_beta: float) -> Tensor:
        beta = torch.tensor([log_beta], dtype=torch.float64).exp()
        return rows @ gaussian_transitions(K, beta)[0]

    def information_after(log_beta: float) -> float:
        q = step(log_beta)
        return 1 + q.xlogy(q).sum(1).mean().item() / math.log(K)

    few = min(K, 8)
    levels = ((torch.arange(few) + 0.5) * K / few).long()  # a few x_0 stand for all
    rows = torch.eye(K, dtype=torch.float64)[levels]
    narrowest = math.log(4 / ((K - 1) ** 2 * math.log(2e9)))  # moves with probability 1e-9
    log_betas = []
    for t in range(1, T - 11):
        target = math.cos(math.pi / 2 * t / (T - 12)) ** 2
        log_betas.append(bisect(information_after, target, narrowest, LOG_WIDEST, 24))
        rows = step(log_betas[-1])
    return torch.tensor([*log_betas, *[LOG_WIDEST] * 12], dtype=torch.float64).exp()


def bisect(f: Callable, target: float, low: float, high: float, steps: int) -> float:
    """Where the falling function f reaches the target; `high` if it does not."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > target else (low, middle)
    return high


# -- transition families: (K, betas) -> Q_1 .. Q_T, float64 [T, S, S] ------------------------------


def uniform_transitions(K: int, betas: Tensor) -> Tensor:
    """Q_t = (1 - beta_t) I + beta_t / K 11^T: redraw the level (appendix A.2.1). S = K."""
    beta = betas[:, None, None]
    return (1 - beta) * torch.eye(K, dtype=torch.float64) + beta / K


def absorbing_transitions(K: int, betas: Tensor) -> Tensor:
    """Q_t = (1 - beta_t) I + beta_t 1 e_m^T: become the mask m (appendix A.2.2). S = K + 1.

    The mask is a state of its own, the last one; in the authors' image code it is the middle grey
    level. Raises ValueError if a pixel can survive to T, since L_T would be infinite.
    """
    if betas.max() < 1:
        raise ValueError("absorbing transitions need some beta_t = 1, for all to end masked")
    beta = betas[:, None, None]
    mask = F.one_hot(torch.tensor(K), K + 1).double()
    return (1 - beta) * torch.eye(K + 1, dtype=torch.float64) + beta * mask


def gaussian_transitions(K: int, betas: Tensor) -> Tensor:
    """A discretized Gaussian kernel for ordinal levels, doubly stochastic (appendix A.2.3). S = K.

    Q_t[i, j] = exp(-4 |i - j|^2 / ((K - 1)^2 beta_t)) / sum over n = -(K-1)..K-1 of
    exp(-4 n^2 / ((K - 1)^2 beta_t)) for i != j. The diagonal takes the rest.
    """
    n = torch.arange(K)
    kernel = torch.exp(-4 * n.double() ** 2 / ((K - 1) ** 2 * betas[:, None]))
    kernel /= 2 * kernel.sum(-1, keepdim=True) - kernel[:, :1]
    mirrored = torch.cat([kernel.flip(-1), kernel[:, 1:]], dim=-1)
    Q = mirrored.unfold(-1, K, 1).flip(-2)  # windows of it; an index by |i - j| is slow
    Q.diagonal(dim1=-2, dim2=-1).zero_()
    Q.diagonal(dim1=-2, dim2=-1).copy_(1 - Q.sum(-1))
    return Q


# -- the table of legal combinations ---------------------------------------------------------------


class Family(NamedTuple):
    """A maker of Q_1 .. Q_T, its schedules (default first), its number of extra states."""

    matrices: Callable[[int, Tensor], Tensor]
    schedules: dict[str, Callable[[int, int], Tensor]]
    extra_states: int = 0
    min_levels: int = 2  # with fewer it would be uniform transitions


UNIFORM = {"cosine": cosine_betas, "linear": linear_betas, "mutual_info": mutual_info_betas}
ABSORBING = {"mutual_info": mutual_info_betas, "cosine": cosine_betas}
GAUSSIAN = {"cosine": information_betas, "fitted": fitted_betas}
FAMILIES = {
    "uniform": Family(uniform_transitions, UNIFORM),
    "absorbing": Family(absorbing_transitions, ABSORBING, extra_states=1),
    "gaussian": Family(gaussian_transitions, GAUSSIAN, min_levels=3),
}
SCHEDULES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.schedules))


def check_transitions(Q: Tensor, K: int, T: int) -> Tensor:
    """Q as float64 on the CPU; a ValueError unless it holds T transition matrices after Q[0]."""
    Q = torch.as_tensor(Q, dtype=torch.float64, device="cpu").detach()
    if Q.ndim != 3 or Q.shape[0] != T + 1 or Q.shape[1] != Q.shape[2] or Q.shape[1] < K:
        wanted = f"[timesteps + 1, S, S] = [{T + 1}, S, S] with S >= {K}"
        raise ValueError(f"Q must be {wanted}, got {list(Q.shape)}")
    if (Q < 0).any() or not torch.allclose(Q.sum(-1), torch.ones(1).double(), atol=1e-6):
        raise ValueError("Q must hold probabilities, each row summing to one")
    if not torch.equal(Q[0], torch.eye(Q.shape[1], dtype=torch.float64)):
        raise ValueError("Q[0] must be the identity (t = 0 is clean data)")
    return Q


# -- the chain of one pixel, looked up by t --------------------------------------------------------


class MarkovChain:
    """The matrices of every t, float64 on the CPU, and their logarithms log_Q, log_bar_Q.

    Q       [T+1, S, S], Q[t][i, j] = q(x_t = j | x_{t-1} = i) (equation 2); Q[0] = identity
    bar_Q   [T+1, S, S], bar_Q[t] = Q[1] Q[2] ... Q[t] (equation 3)
    prior   [S], p(x_T): the mean over the K levels of q(x_T | x_0)
    """

    def __init__(self, Q: Tensor, K: int):
        self.Q, self.bar_Q = Q, Q.clone()
        for t in range(1, len(Q)):
            self.bar_Q[t] = self.bar_Q[t - 1] @ Q[t]
        self.bar_Q /= self.bar_Q.sum(-1, keepdim=True)  # or rounding would grow over T products
        self.prior = self.bar_Q[-1, :K].mean(0)
        self.log_Q, self.log_bar_Q = Q.log(), self.bar_Q.log()
        self.tables: dict[tuple, Tensor] = {}  # not buffers, since MPS has no float64

    def at(self, name: str, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The matrices called `name` at t [B]: [B, S, S] on the device."""
        key = (name, device, dtype)
        if key not in self.tables:
            self.tables[key] = getattr(self, name).to(dtype).to(device)
        return self.tables[key][t.long().to(device)]

    def rows(self, name: str, t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Row x [B, 1, H, W] of the matrix at t, pixel by pixel: [B, S, H, W]."""
        return columns(self.at(name, t, x.device, dtype).mT, x)

    def columns(self, name: str, t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Column x of the matrix at t, pixel by pixel: [B, S, H, W]."""
        return columns(self.at(name, t, x.device, dtype), x)

    def log_q_x_t(self, log_p: Tensor, t: Tensor) -> Tensor:
        """log of the sum over x_0 of p(x_0) q(x_t = j | x_0): [B, K, H, W] -> [B, S, H, W]."""
        log_bar_Q = self.at("log_bar_Q", t, log_p.device, log_p.dtype)
        return log_matmul(log_p, log_bar_Q[:, : log_p.shape[1]])


def columns(matrices: Tensor, x: Tensor) -> Tensor:
    """[B, S, S], x [B, 1, H, W] -> [B, S, H, W]."""
    index = x.long().flatten(2).expand(-1, matrices.shape[1], -1)
    return matrices.gather(2, index).unflatten(2, x.shape[2:])


def markov_chain(
    K: int, T: int, transition: str | None, schedule: str | None, Q: Tensor | None
) -> tuple[MarkovChain, dict]:
    """The chain of these names, or of Q, and its config. Raises ValueError for wrong arguments."""
    if not 2 <= K <= 256 or T < 1 or (T + 1) * (K + 1) ** 2 > 2**28:
        limits = "K must be in 2..256, T at least 1, T K^2 at most 2^28 to fit into memory"
        raise ValueError(f"{limits}; got K = {K}, T = {T}")
    if Q is None:
        transition = check_choice("transition", transition or "uniform", FAMILIES)
        schedule = schedule or next(iter(FAMILIES[transition].schedules))
        config = {"transition": transition, "schedule": schedule}
        chain = named_chain(K, T, **config)
    elif transition or schedule:
        raise ValueError("give Q or the name of a transition and its schedule, not both")
    else:
        chain = MarkovChain(check_transitions(Q, K, T), K)
        config = {"Q": chain.Q}
    distance = 0.5 * (chain.bar_Q[-1, :K] - chain.prior).abs().sum(-1).max()  # total variation
    if distance > 1e-3:
        far = f"bar_Q[T] is far from stationary (total variation {distance:.3f}), so L_T > 0"
        warnings.warn(f"{far}. Use another schedule or a larger T.", stacklevel=1)
    return chain, config


@lru_cache(maxsize=4)  # so that DiscreteDiffusions with the same chain share its tables
def named_chain(K: int, T: int, transition: str, schedule: str) -> MarkovChain:
    matrices, schedules, _, min_levels = FAMILIES[transition]
    if schedule not in schedules:
        choices = " or ".join(schedules)
        raise ValueError(f"{transition} transitions need the schedule {choices}, not {schedule}")
    if min_levels > K:
        raise ValueError(f"{transition} transitions between {K} levels are uniform transitions")
    steps = matrices(K, schedules[schedule](T, K))
    return MarkovChain(torch.cat([torch.eye(steps.shape[-1]).double()[None], steps]), K)


# -- operations on distributions, whose states are in dimension 1 ----------------------------------


def draw(probs: Tensor, u: Tensor | None = None, mode: bool = False) -> Tensor:
    """Sample from probs [B, S, H, W] by inverting the cumulative distribution at u [B, 1, H, W],
    or take the most probable state: int64 [B, 1, H, W].

    A state of probability 0 is never drawn. u = 0 is raised a little: it would draw the first state
    with any probability at all. Raises ValueError (on the CPU) for NaN.
    """
    if probs.device.type == "cpu" and probs.isnan().any():
        raise ValueError("the network's output is not finite")
    if mode:
        return probs.argmax(1, keepdim=True)
    u = torch.rand(len(probs), 1, *probs.shape[2:], device=probs.device) if u is None else u
    u = u.clamp(min=torch.finfo(u.dtype).eps / 4)
    cumulative = probs.cumsum(1)
    return (u * cumulative[:, -1:] >= cumulative[:, :-1]).sum(1, keepdim=True)


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum of q log(q / p) over the states, in nats, with 0 log 0 = 0; +inf where q > 0 = p."""
    terms = log_q.exp() * (log_q - log_p)
    return torch.where(log_q == -torch.inf, 0.0, terms).sum(1)


def log_matmul(log_a: Tensor, log_M: Tensor) -> Tensor:
    """log(a M): log_a [B, K, H, W], log_M [B, K, S] -> log sum over k of a_k M_kj, [B, S, H, W].

    Up to 4 terms are added as logarithms, one by one. For speed, more become a product of float64
    matrices; where that is below 1e-307 (e^-707), the diagonal term replaces it.
    """
    (K, S), on_mps = log_M.shape[1:], log_a.device.type == "mps"  # MPS has no float64
    if K <= 4:
        terms = log_a[:, :, None] + log_M[..., None, None]
        # -inf in every term would turn the gradient into NaN
        total = reduce(torch.logaddexp, terms.clamp(min=LOG_ZERO).unbind(1))
        return total.masked_fill(total < LOG_ZERO / 2, -torch.inf)
    wide, (low, high) = (torch.float32, (1e-37, 80)) if on_mps else (torch.float64, (1e-307, 700))
    a = log_a.flatten(2).to(wide).clamp(max=high).exp()  # [B, K, H W]
    product = (log_M.to(wide).exp().mT @ a).view(len(a), S, *log_a.shape[2:])
    log_product = product.clamp(min=low).log().to(log_a.dtype)
    diagonal = log_a + log_M.diagonal(dim1=1, dim2=2)[..., None, None]
    diagonal = F.pad(diagonal, (0, 0, 0, 0, 0, S - K), value=-torch.inf)
    return torch.where(product < low, diagonal, log_product)


def as_float(x: Tensor) -> Tensor:
    """Half precision to float32; others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_choice(kind: str, value: str, choices: Iterable[str]) -> str:
    """value, or a ValueError if it is not one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {kind} {value!r}: choose from {', '.join(choices)}")
    return value


def check_integers(name: str, x: Tensor, shape: tuple, low: int, high: int) -> Tensor:
    """x as a tensor; a ValueError unless it holds integers low..high (checked on the CPU only, to
    avoid waiting for a GPU). In `shape`, None = any length."""
    x = torch.as_tensor(x)
    fits = len(shape) == x.ndim and all(a in (None, b) for a, b in zip(shape, x.shape, strict=True))
    if not fits or x.is_floating_point() or x.is_complex():
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{name} must be integers [{wanted}], got {x.dtype} {list(x.shape)}")
    if x.device.type == "cpu" and x.numel() and not (low <= x.min() and x.max() <= high):
        raise ValueError(f"{name} must be in {low}..{high}, got {x.min()}..{x.max()}")
    return x


class Streams:
    """A random stream for each image i of first .. first + n - 1, made from (seed, i, *more)."""

    def __init__(self, n: int, seed: int, first: int, *more: int):
        limits = {"n": (n, 1, 2**62), "seed": (seed, 0, 2**32 - 1), "first": (first, 0, 2**62)}
        for name, (value, low, high) in limits.items():
            if not isinstance(value, int | np.integer) or not low <= value <= high:
                raise ValueError(f"{name} must be an integer in {low}..{high}, got {value!r}")
        images = range(first, first + n)
        self.streams = [np.random.default_rng((seed, i, *more)) for i in images]

    def uniforms(self, shape: tuple, device: torch.device) -> Tensor:
        """The next uniforms in [0, 1) of every stream, float32 [n, *shape]."""
        noise = np.stack([stream.random(shape, dtype=np.float32) for stream in self.streams])
        return torch.from_numpy(noise).to(device)

    def gumbel(self) -> Tensor:
        """The next Gumbel variable of every stream, float64 [n]."""
        return torch.tensor([stream.gumbel() for stream in self.streams], dtype=torch.float64)
