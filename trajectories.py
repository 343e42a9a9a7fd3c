"""Whole trajectories x_T, ..., x_0: chains of fewer timesteps, weights, and filling in.

Importance weights of trajectories tighten the bound (Burda et al. 2016). Filling in is
self-normalised importance sampling over trajectories; with N = 1 it is replacement (RePaint less
its resampling, Lugmayr et al. 2022). Images, t and y are as in diffusion.py.
"""

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import LAST_STEPS, DiscreteDiffusion
from transitions import Streams, check_choice, check_integers, draw

# -- fewer timesteps -------------------------------------------------------------------------------


def respaced(diffusion: DiscreteDiffusion, timesteps: int | list[int]) -> DiscreteDiffusion:
    """The same process seen at fewer timesteps, around the same network.

    Between kept timesteps, Q is the product of the skipped ones, so bar_Q at a kept timestep stays
    what the network was trained for. The network is still given the original t.

    `timesteps`: how many, 1..T, spread so that every step moves pixels about equally far; or a
    rising list of those to keep, up to T. Raises ValueError for others, TypeError unless integers.
    """
    T = diffusion.timesteps
    given = isinstance(timesteps, list | tuple)
    kept = [0, *map(operator.index, timesteps)] if given else evenly_spread(diffusion, timesteps)
    if kept[-1] != T or any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"the timesteps to keep must rise from at least 1 to {T}")
    steps = [reduce(torch.matmul, diffusion.Q[a + 1 : b + 1]) for a, b in pairwise(kept)]
    config = diffusion.config | {"timesteps": len(steps), "transition": None, "schedule": None}
    config |= {"Q": torch.stack([diffusion.Q[0], *steps]), "network_t": diffusion.network_t[kept]}
    other = type(diffusion)(diffusion.model, **config)
    other.num_labels = diffusion.num_labels
    return other


def evenly_spread(diffusion: DiscreteDiffusion, n: int) -> list[int]:
    """0 and n timesteps up to T, evenly spaced in the mean distance of x_t from x_0.

    For uniform and absorbing transitions that is the share of pixels that are changed. With
    Gaussian transitions nearly all pixels change early, but by little.
    """
    T, K, n = diffusion.timesteps, diffusion.num_levels, operator.index(n)
    if not 1 <= n <= T:
        raise ValueError(f"timesteps must be in 1..{T}, as many as in training, got {n}")
    level = torch.arange(diffusion.num_states, dtype=torch.float64)
    distance = (level[:K, None] - level).abs()
    distance[:, K:] = K - 1  # a mask is far from every level
    moved = torch.einsum("tij,ij->t", diffusion.bar_Q[:, :K], distance) / K  # [T+1]
    kept = [0]
    for k in range(1, n):
        nearest = int((moved - k / n * moved[T]).abs().argmin())
        # distinct, leaving room for the rest
        kept.append(min(max(nearest, kept[-1] + 1), T - (n - k)))
    return [*kept, T]


# -- trajectories and their weights ----------------------------------------------------------------


@torch.no_grad()
def walk(
    diffusion: DiscreteDiffusion,
    known: Tensor,
    next_uniforms: Callable[[], Tensor],
    y: Tensor | None = None,
    guidance: float = 0.0,
    last_step: str = "draw",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x_T, ..., x_0, each with the log-weight of the trajectory up to there, [B].

    Given pixels draw x_T ~ q(x_T | x_0) and x_{t-1} ~ q(x_{t-1} | x_t, x_0). The others draw from
    p(x_T) and p_theta. The log-weight sums log p - log q over the draws of given pixels.

    known: integers [B, 1, H, W], levels where they are given and -1 where they are not.
    next_uniforms: returns uniforms for the next draw, [B, 1, H, W]. All but the network runs on
    their device and in their dtype. The others: as in `DiscreteDiffusion.reverse_process`.
    """
    u = next_uniforms()
    known = known.to(u.device)
    given, x_0 = known >= 0, known.clamp(min=0)
    T = torch.full((len(known),), diffusion.timesteps, device=u.device)
    log_p = diffusion.prior.log().to(u)[None, :, None, None].expand(len(u), -1, *u.shape[2:])
    log_q = torch.where(given, diffusion.q_x_t(x_0, T, u.dtype).log(), log_p)
    x_t, log_w = draw(log_q.exp(), u), torch.zeros(len(u), dtype=u.dtype, device=u.device)
    for step in range(diffusion.timesteps, -1, -1):
        ratio = log_p.gather(1, x_t) - log_q.gather(1, x_t)
        log_w = log_w + torch.where(given, ratio, 0.0).sum((1, 2, 3))
        yield x_t, log_w
        if step == 0:
            return
        u, t = next_uniforms(), torch.full_like(T, step)
        logits = diffusion.x_0_logits(x_t.to(diffusion.device), t, y, guidance).to(u)
        log_p = diffusion.log_p_theta(x_t, t, logits)
        log_q = torch.where(given, diffusion.log_q_posterior(x_t, x_0, t, u.dtype), log_p)
        x_t = draw(log_q.exp(), u, mode=last_step == "mode" and step == 1)


def log_weights(
    diffusion: DiscreteDiffusion,
    x_0: Tensor,
    trajectories: int,
    generator: torch.Generator | None = None,
    y: Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """log p_theta(x_{0:T}) - log q(x_{1:T} | x_0) for draws from q(x_{1:T} | x_0), float64 [B, N].

    Their mean estimates minus the bound (equation 1). The mean of the exponentials estimates
    p_theta(x_0); see `importance_weighted`.

    x_0: images, integers [B, 1, H, W]. trajectories: N, for each image. generator: a CPU generator
    for all draws, which also depend on batch_size, the trajectories at a time. y: labels [B].
    Raises ValueError for arguments out of range, or a network whose output is not finite.
    """
    batch_size = diffusion.suitable_batch() if batch_size is None else batch_size
    if trajectories < 1 or batch_size < 1:
        raise ValueError("trajectories and batch_size must be at least 1")
    x_0 = diffusion.check_x_0(x_0).cpu().long()
    y = None if y is None else diffusion.check_labels(y, len(x_0))
    device = "cpu" if diffusion.device.type == "mps" else diffusion.device  # MPS has no float64

    def next_uniforms(n: int) -> Tensor:
        u = torch.rand(n, *x_0.shape[1:], generator=generator, dtype=torch.float64)
        return u.to(device)

    rows, log_w = torch.arange(len(x_0)).repeat_interleave(trajectories), []
    total = len(rows) * (diffusion.timesteps + 1)
    with tqdm(total=total, desc="weights", unit_scale=True, disable=not progress) as bar:
        for some in rows.split(batch_size):
            labels = None if y is None else y[some]
            for _, last in walk(diffusion, x_0[some], partial(next_uniforms, len(some)), labels):
                bar.update(len(last))
            log_w.append(last.cpu())
    log_w = torch.cat(log_w).view(len(x_0), trajectories)
    if log_w.isnan().any():
        raise ValueError("the network's output is not finite")
    return log_w


def importance_weighted(log_w: Tensor) -> Tensor:
    """-log (1/N) sum over n of w_n (Burda et al. 2016): [B, N] -> [B], in nats.

    It is the plain bound for N = 1. In expectation it falls with N, towards -log p_theta(x_0).
    """
    return math.log(log_w.shape[1]) - log_w.logsumexp(1)


# -- filling in ------------------------------------------------------------------------------------


def fill_in(
    diffusion: DiscreteDiffusion, known: Tensor, n: int, batch_size=None, first=0, y=None, **how
) -> Tensor:
    """Draw the unknown pixels of n images: uint8 [n, 1, H, W] on the CPU. Arguments and errors as
    in `filling_process`; batch_size is the number of images at a time."""
    batch_size = diffusion.suitable_batch() if batch_size is None else batch_size
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    known = check_known(diffusion, known, n)
    y = None if y is None else diffusion.check_labels(y, n)
    x_0 = []
    for rows in torch.arange(n).split(batch_size):
        how |= {"first": first + int(rows[0]), "y": None if y is None else y[rows]}
        x_0.append(filling_process(diffusion, known[rows], len(rows), **how)[-1].byte())
    return torch.cat(x_0)


def filling_process(
    diffusion: DiscreteDiffusion,
    known: Tensor,
    n: int,
    seed: int = 0,
    first: int = 0,
    y: Tensor | None = None,
    guidance: float = 0.0,
    particles: int = 16,
    last_step: str = "draw",
    progress: bool = False,
) -> Tensor:
    """x_T, ..., x_0 of n images whose unknown pixels are drawn: [T + 1, n, 1, H, W] on the CPU.

    For each image N = `particles` trajectories are drawn in which given pixels follow the forward
    process and the others p_theta. One of them is chosen with a probability proportional to its
    weight. As N grows, x_0 follows the model's own p_theta(x_unknown | x_known). N = 1 is
    replacement: it is biased, since early steps see the given pixels only as noise.

    known: integers [n or 1, 1, H, W], levels where they are given and -1 elsewhere. The others are
    as in `DiscreteDiffusion.reverse_process`. Trajectory 0 of image i uses its random stream
    (seed, i), trajectory j uses (seed, i, j). Raises ValueError for arguments out of range.
    """
    check_choice("last step", last_step, LAST_STEPS)
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")
    known = check_known(diffusion, known, n)
    y = None if y is None else diffusion.check_labels(y, n)
    dtype = torch.uint8 if diffusion.num_states <= 256 else torch.int16
    walked = torch.empty(diffusion.timesteps + 1, *known.shape, dtype=dtype)
    chosen, best_score = walked.clone(), torch.full((n,), -math.inf, dtype=torch.float64)
    total = n * particles * len(walked)
    with tqdm(total=total, desc="filling in", unit_scale=True, disable=not progress) as bar:
        for j in range(particles):
            streams = Streams(n, seed, first, *([j] if j else []))
            next_uniforms = partial(streams.uniforms, diffusion.image_shape, diffusion.device)
            trajectory = walk(diffusion, known, next_uniforms, y, guidance, last_step)
            for k, (x_t, log_w) in enumerate(trajectory):
                walked[k], score = x_t, log_w
                bar.update(n)
            # The largest log-weight plus Gumbel noise is a draw in proportion to the weights.
            score = score.cpu().double() + streams.gumbel()
            if j == 0:  # where nothing is given, all weights are 1: keep the ordinary sample
                score[(known < 0).flatten(1).all(1)] = math.inf
            better = score >= best_score
            best_score = torch.where(better, score, best_score)
            chosen[:, better] = walked[:, better]
    return chosen


def check_known(diffusion: DiscreteDiffusion, known: Tensor, n: int) -> Tensor:
    """The given pixels of n images, int64 [n, 1, H, W] on the CPU."""
    known = torch.as_tensor(known).cpu()
    shape = (1 if known.shape[:1] == (1,) else n, *diffusion.image_shape)
    known = check_integers("known", known, shape, -1, diffusion.num_levels - 1)
    return known.long().expand(n, -1, -1, -1)
