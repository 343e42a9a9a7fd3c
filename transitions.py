"""The transition matrices of D3PM and their noise schedules (Austin et al. 2021, section 3.1 and appendix A.2).

    beta_1 .. beta_T   float64 [T], how much noise each step adds
    Q_1 .. Q_T         float64 [T, S, S], Q_t[i, j] = q(x_t = j | x_{t-1} = i); S states, K of them grey levels

A new family is a function that returns Q_1 .. Q_T and one entry in `FAMILIES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = math.log(1e4)  # of a squared width that is as good as infinite: the kernel is flat

# ---------------------------------------------------------------------------------------------------------------------
# Noise schedules: (T, K) -> beta_1 .. beta_T, float64 [T]


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


def fitted_betas(T: int, K: int) -> Tensor:
    """Evenly spaced squared widths for Gaussian transitions, as in the paper, with end points that fit K and T.

    beta_1 lets a middle level go in the first step with probability 0.001; beta_T is found by bisection so that every
    row of bar_Q_T is within 1e-4 (total variation) of uniform. The paper's 1e-4 .. 0.02 are made for K = 256 and
    T = 1000: with few levels the kernel is then so narrow that next to nothing ever moves.

    Raises:
        ValueError: if no width reaches uniform in T steps.
    """
    beta_1 = 4 / ((K - 1) ** 2 * math.log(2 / 0.001))

    def betas(log_beta_T: float) -> Tensor:
        return torch.linspace(beta_1, math.exp(log_beta_T), T, dtype=torch.float64)

    def distance(log_beta_T: float) -> float:
        row = np.eye(K)[0]  # an edge is the last to forget where it started
        for spectrum, stays in zip(*gaussian_blurs(K, betas(log_beta_T)), strict=True):
            row = blurred(row, spectrum, stays)
        return 0.5 * np.abs(row - 1 / K).sum()

    if distance(WIDEST) > 1e-4:
        raise ValueError(f"gaussian transitions can't reach noise in {T} timesteps: take more")
    return betas(bisect(distance, 1e-4, math.log(beta_1), WIDEST, 40))


def information_betas(T: int, K: int) -> Tensor:
    """Squared widths for Gaussian transitions such that what x_t says about x_0 falls as cos^2(pi/2 t/T), or nearly.

    That is the mutual information of x_t and x_0 for a pixel whose K levels are equally likely, as a share of log K
    (appendix A.7 lets it fall in a line). Evenly spaced widths have lost half of it after a tenth of the steps for
    K = 8, after a fiftieth for K = 256, and nothing is left to lose in the second half. The last 12 steps are as wide
    as can be and lose the rest: a step goes at most half of the way to uniform.

    Raises:
        ValueError: if T is too small for that.
    """
    if T <= 12:
        raise ValueError(f"gaussian transitions can't reach noise in {T} timesteps: take more")

    def step(rows: np.ndarray, log_beta: float) -> np.ndarray:
        spectra, stays = gaussian_blurs(K, torch.tensor([math.exp(log_beta)], dtype=torch.float64))
        return blurred(rows, spectra[0], stays[0])

    def information_after(rows: np.ndarray, log_beta: float) -> float:
        q = step(rows, log_beta).clip(1e-300)
        return 1 + (q * np.log(q)).sum(1).mean() / math.log(K)

    few = min(K, 8)
    rows = np.eye(K)[((np.arange(few) + 0.5) * K / few).astype(int)]  # a few x_0 that stand for all
    narrowest = math.log(
        4 / ((K - 1) ** 2 * math.log(2e9))
    )  # a pixel moves once in a thousand million times
    log_betas = []
    for t in range(1, T - 11):
        target = math.cos(math.pi / 2 * t / (T - 12)) ** 2
        log_betas.append(bisect(partial(information_after, rows), target, narrowest, WIDEST, 24))
        rows = step(rows, log_betas[-1])
    return torch.tensor([*log_betas, *[WIDEST] * 12], dtype=torch.float64).exp()


def bisect(
    f: Callable[[float], float], target: float, low: float, high: float, steps: int
) -> float:
    """Where the falling f comes down to the target, or just beyond; `high` if it doesn't."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > target else (low, middle)
    return high


# ---------------------------------------------------------------------------------------------------------------------
# Transition families: (K, betas) -> Q_1 .. Q_T, float64 [T, S, S]


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
        raise ValueError(
            "absorbing transitions need a schedule that ends with every pixel masked (some beta_t = 1)"
        )
    beta = betas[:, None, None]
    mask = F.one_hot(torch.tensor(K), K + 1).double()
    return (1 - beta) * torch.eye(K + 1, dtype=torch.float64) + beta * mask


def gaussian_kernel(K: int, betas: Tensor) -> Tensor:
    """What Q_t[i, j] is for i != j in `gaussian_transitions`, by the distance |i - j| = 0..K-1: float64 [T, K]."""
    n = torch.arange(K, dtype=torch.float64)
    kernel = torch.exp(-4 * n**2 / ((K - 1) ** 2 * betas[:, None]))
    return kernel / (2 * kernel.sum(-1, keepdim=True) - kernel[:, :1])


def gaussian_blurs(K: int, betas: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What `blurred` takes for each of `gaussian_transitions`: spectra [T, K+1], and what stays beyond, [T, K]."""
    kernel = gaussian_kernel(K, betas).numpy()
    mirrored = np.concatenate([kernel, 0 * kernel[:, :1], kernel[:, :0:-1]], axis=1)
    cumulative = kernel.cumsum(1)
    return np.fft.rfft(mirrored), 1 - (cumulative + cumulative[:, ::-1] - kernel[:, :1])


def blurred(rows: np.ndarray, spectrum: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """rows @ Q_t, [..., K]: but for its diagonal, Q_t convolves; 2K places keep the ends apart."""
    K = rows.shape[-1]
    return np.fft.irfft(spectrum * np.fft.rfft(rows, 2 * K), 2 * K)[..., :K] + stays * rows


def gaussian_transitions(K: int, betas: Tensor) -> Tensor:
    """Discretized Gaussian kernel for ordinal levels, doubly stochastic (appendix A.2.3). S = K.

    Q_t[i, j] = exp(-4 |i - j|^2 / ((K - 1)^2 beta_t)) / sum over n = -(K-1)..K-1 of exp(-4 n^2 / ((K - 1)^2 beta_t))
    for i != j, and the diagonal takes the rest.

    It takes K of at least 3: for K = 2 a symmetric kernel is the uniform one.
    """
    n = torch.arange(K)
    Q = gaussian_kernel(K, betas)[:, (n[:, None] - n).abs()]
    Q.diagonal(dim1=-2, dim2=-1).zero_()
    Q.diagonal(dim1=-2, dim2=-1).copy_(1 - Q.sum(-1))
    return Q


# ---------------------------------------------------------------------------------------------------------------------
# The table of legal combinations


@dataclass(frozen=True)
class Family:
    """How a family makes Q_t, the schedules that go with it, the default first, and its states beyond the levels.

    With fewer than `least_levels` it would be uniform transitions.
    """

    matrices: Callable[[int, Tensor], Tensor]
    schedules: dict[str, Callable[[int, int], Tensor]]
    extra_states: int = 0
    least_levels: int = 2


FAMILIES = {
    "uniform": Family(
        uniform_transitions,
        {"cosine": cosine_betas, "linear": linear_betas, "mutual_info": mutual_info_betas},
    ),
    "absorbing": Family(
        absorbing_transitions,
        {"mutual_info": mutual_info_betas, "cosine": cosine_betas},
        extra_states=1,
    ),
    "gaussian": Family(
        gaussian_transitions, {"cosine": information_betas, "fitted": fitted_betas}, least_levels=3
    ),
}
SCHEDULES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.schedules))


def family_and_schedule(transition: str, schedule: str | None) -> tuple[Family, str]:
    """The family of that name and its schedule's name, by default its first. Raises ValueError in one line."""
    if transition not in FAMILIES:
        raise ValueError(f"unknown transition {transition!r}: choose from {', '.join(FAMILIES)}")
    family = FAMILIES[transition]
    schedule = next(iter(family.schedules)) if schedule is None else schedule
    if schedule not in family.schedules:
        raise ValueError(
            f"{transition} transitions go with the schedule {' or '.join(family.schedules)}, not {schedule}"
        )
    return family, schedule


def transition_matrices(transition: str, schedule: str | None, K: int, T: int) -> Tensor:
    """Q as float64 [T+1, S, S] with Q[0] the identity. Raises ValueError for what does not go together."""
    family, schedule = family_and_schedule(transition, schedule)
    if family.least_levels > K:
        raise ValueError(
            f"{transition} transitions between {K} levels are uniform transitions in disguise: use those"
        )
    steps = family.matrices(K, family.schedules[schedule](T, K))
    return torch.cat([torch.eye(steps.shape[-1], dtype=torch.float64)[None], steps])


def check_transitions(Q: Tensor, K: int, T: int) -> Tensor:
    """Q as float64 on the CPU, or a ValueError that says why it is not a chain of T transition matrices."""
    try:
        Q = torch.as_tensor(Q, dtype=torch.float64, device="cpu").detach()
    except (TypeError, RuntimeError):
        raise ValueError("Q must be a tensor") from None
    if Q.ndim != 3 or Q.shape[0] != T + 1 or Q.shape[1] != Q.shape[2] or Q.shape[1] < K:
        raise ValueError(
            f"Q must be [timesteps + 1, S, S] = [{T + 1}, S, S] with S >= {K}, got {list(Q.shape)}"
        )
    if (Q < 0).any() or not torch.allclose(
        Q.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-6
    ):
        raise ValueError("Q must hold probabilities, each row summing to one")
    if not torch.equal(Q[0], torch.eye(Q.shape[1], dtype=torch.float64)):
        raise ValueError("Q[0] must be the identity (t = 0 is clean data)")
    return Q
