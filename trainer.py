"""One training step and all that it carries from step to step: weights, their average, the optimizer, the noise."""

import copy
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dataset import stream_seed
from diffusion import DiscreteDiffusion
from model import accelerated

OPTIMIZERS = ("muon", "adamw")
DECAYS = ("late", "cosine")
WARMUP_STEPS = 100
LATE = 0.3  # the share of the steps over which the late decay goes down
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Processes:
    """Which process this is among those that torchrun has started: by number, and by number on this machine."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Raises ValueError if torchrun's variables are there in part or are not numbers."""
        text = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        if not any(text):
            return cls()
        try:
            rank, local_rank, size = map(int, text)
            if not 0 <= local_rank <= rank < size:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"RANK, LOCAL_RANK and WORLD_SIZE are {', '.join(map(repr, text))}: torchrun sets all three"
            ) from None
        return cls(rank, local_rank, size)

    def start(self, device: torch.device) -> torch.device:
        """Meet the others, if any; the device of this process."""
        if self.size == 1:
            return device
        if device.type == "cuda":
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return device

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over all processes, which wait here for each other."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums / self.size).tolist()

    def share(self, batch_size: int) -> slice:
        """This process's part of a batch. Raises ValueError if it can't be shared equally."""
        if batch_size % self.size:
            raise ValueError(
                f"the batch of {batch_size} can't be shared equally by {self.size} processes"
            )
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)


class Trainer:
    """A diffusion in training.

    Args:
        diffusion: around the network, which is already on its device.
        total_steps: how many steps the learning rate is planned for.
        batch_size: images per step, those of all processes together.
        lr: the peak learning rate; see `learning_rate` for its course with `decay`.
        optimizer: "adamw" or "muon".
        label_dropout: the share of images whose label is hidden from a network that takes labels.
        seed: of the noise; with the number of the step it decides all that is random here, but for a network's dropout,
            whose masks also depend on this process's share of the batch.
        amp: run the network in bfloat16. compiled: compile it first.
        max_grad_norm: the gradient is clipped to this norm.

    Attributes:
        network: what is trained. averaged: the diffusion around the average of its weights, in eval mode.
        steps: how many steps are done.
        source: the device that the noise is drawn on, and that batches are best served from.

    Raises:
        ValueError: for Muon and a network without `hidden_matrices`, or a batch that can't be shared equally.
    """

    def __init__(
        self,
        diffusion: DiscreteDiffusion,
        total_steps: int,
        batch_size: int = 128,
        lr: float = 1e-4,
        optimizer: str = "adamw",
        decay: str = "late",
        label_dropout: float = 0.1,
        seed: int = 0,
        amp: bool = False,
        compiled: bool = False,
        max_grad_norm: float = MAX_GRAD_NORM,
        processes: Processes = Processes(),
    ):
        self.network, self.steps = diffusion.model, 0
        self.total_steps, self.batch_size, self.lr, self.decay = total_steps, batch_size, lr, decay
        self.label_dropout, self.seed, self.max_grad_norm = label_dropout, seed, max_grad_norm
        self.shard = processes.share(batch_size)
        model = accelerated(self.network, amp, compiled)
        model = DistributedDataParallel(model) if processes.size > 1 else model
        self.diffusion = diffusion.around(model)
        self.averaged = diffusion.around(copy.deepcopy(self.network)).eval()
        self.network.train()
        device = next(self.network.parameters()).device
        self.source = device if device.type == "cuda" else torch.device("cpu")
        self.records = device.type == "cuda" and processes.size == 1
        if self.records:
            torch.cuda.set_device(device)
        self.rate = (
            torch.tensor(lr, device=device) if self.records else lr
        )  # recorded: read from where it was
        options = {"lr": self.rate, "capturable": self.records}
        if optimizer == "muon":
            dtype = torch.bfloat16 if amp else torch.float32
            self.optimizer: torch.optim.Optimizer = Muon(self.network, dtype, **options)
        else:
            parameters = self.network.parameters()
            self.optimizer = torch.optim.AdamW(
                parameters, betas=BETAS, weight_decay=WEIGHT_DECAY, **options
            )
        self.update = Recorded(self._update) if self.records else self._update

    def step(self, x_0: Tensor, y: Tensor | None = None) -> Tensor:
        """Learn from one batch of all processes, x_0 [B, 1, H, W] and labels y [B]; the loss, a scalar, detached.

        The noise depends on (seed, step) alone: a resumed run draws what the uninterrupted one would have drawn, and
        processes that share a batch draw what one process would have drawn, and take their part of it. (CUDA draws its
        own: the CPU's would take longer than the step.) What the network draws, dropout's masks, comes from torch's
        global generator, which is seeded here; it depends on the process's share, too.
        """
        device = next(self.network.parameters()).device
        with record_function("noise"):
            generator = torch.Generator(self.source).manual_seed(
                stream_seed(self.seed, 0, self.steps)
            )
            t = self.diffusion.draw_t(len(x_0), generator)
            u = torch.rand(x_0.shape, generator=generator, device=self.source)
            if self.diffusion.num_labels:
                hidden = (
                    torch.rand(len(x_0), generator=generator, device=self.source)
                    < self.label_dropout
                )
                y = torch.full((len(x_0),), -1) if y is None else y
                y = y.to(self.source).masked_fill(hidden, -1)
            else:
                y = None
            x_0, t, u, y = (v if v is None else v[self.shard].to(device) for v in (x_0, t, u, y))
            torch.manual_seed(
                stream_seed(self.seed, 3, self.steps, self.shard.start)
            )  # for a network that draws
        rate = learning_rate(self.lr, self.steps, self.total_steps, self.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.fill_(rate) if self.records else rate
        loss = self.update(x_0, t, u, y)
        with record_function("average"):
            move_average(self.averaged.model, self.network, self.steps)
        self.steps += 1
        return loss

    def _update(self, x_0: Tensor, t: Tensor, u: Tensor, y: Tensor | None) -> Tensor:
        """Loss, gradient, optimizer: what CUDA records. It waits for no result."""
        with record_function("forward"):
            loss = self.diffusion.loss(x_0, t, u, y)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
            self.optimizer.step()
        return loss.detach()

    def validate(self, x_0: Tensor) -> float:
        """The averaged network's bound in nats per image, L_0 and one t a digit: the same noise each time."""
        return (
            self.averaged.variational_bound(x_0, 1, torch.Generator().manual_seed(0)).mean().item()
        )

    def state_dict(self) -> dict:
        return {
            "weights": self.network.state_dict(),
            "averaged_weights": self.averaged.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if it is another network's or optimizer's."""
        try:
            self.network.load_state_dict(state["weights"])
            self.averaged.model.load_state_dict(state["averaged_weights"])
            saved = state["optimizer"]  # perhaps on another kind of device
            groups = [group | {"capturable": self.records} for group in saved["param_groups"]]
            self.optimizer.load_state_dict(saved | {"param_groups": groups})
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the run to resume does not fit this version of the repository: {reason}"
            ) from None
        self.steps = state["step"]
        if self.records:
            self.update = Recorded(self._update)  # the optimizer's tensors are others now


def learning_rate(peak: float, step: int, total: int, decay: str = "late") -> float:
    """A short warm-up; then the peak until the last 30 % of the steps, which go down to 0 in a line; or a cosine."""
    rate = peak * min(1.0, (step + 1) / max(1, min(WARMUP_STEPS, total // 10)))
    if decay == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total))
    return rate * min(1.0, (total - step) / (LATE * total))


def decay_start(total: int) -> int:
    """The first step of the late decay."""
    return math.ceil((1 - LATE) * total)


@torch.no_grad()
def move_average(averaged: nn.Module, current: nn.Module, n: int) -> None:
    """Exponential moving average over about the last ninth of the n steps so far, at most 1,000 of them."""
    decay = min(0.999, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_(list(averaged.parameters()), list(current.parameters()), 1 - decay)
    for a, c in zip(averaged.buffers(), current.buffers(), strict=True):
        a.lerp_(c, 1 - decay) if a.is_floating_point() else a.copy_(c)


class Recorded:
    """A function of CUDA tensors that does the same thing every time: recorded as a CUDA graph, then replayed.

    The thousand kernels of a step take less time than it takes to ask for them one by one. The first calls are made as
    usual: they compile, and find their memory. Each call's tensors have the shapes of the first one's, and the function
    may not wait for a result.
    """

    USUAL = 3

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()

    def __call__(self, *given: Tensor | None) -> Tensor:
        self.calls += 1
        if self.calls <= self.USUAL:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # so it is, but not yet
                result = self.function(*given)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.USUAL + 1:
            self.given, self.graph = (
                [v if v is None else v.clone() for v in given],
                torch.cuda.CUDAGraph(),
            )
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.function(*self.given)
        for mine, yours in zip(self.given, given, strict=True):
            if mine is not None:
                mine.copy_(yours)
        self.graph.replay()
        return self.result.clone()


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices inside the network step along their orthogonalised momentum (Jordan et al. 2024).

    torch.optim.Muon takes no convolutions, and computes in bfloat16, which most CPUs only emulate. The update is scaled
    to AdamW's typical size, so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    MOMENTUM = 0.95

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32, **options):
        if not hasattr(network, "hidden_matrices"):
            raise ValueError(
                f"muon needs a network with hidden_matrices(), which {type(network).__name__} has not"
            )
        super().__init__(network.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, **options)
        self.dtype = dtype
        self.alike: dict[tuple, list[nn.Parameter]] = defaultdict(
            list
        )  # matrices of one shape, which go together
        for p in network.hidden_matrices():
            self.alike[p.flatten(1).shape].append(p)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for shape, matrices in self.alike.items():
            for p in matrices:
                if p not in self.state:  # AdamW wants a step in every state that it loads
                    self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            gradients, momenta = (
                [p.grad for p in matrices],
                [self.state[p]["momentum"] for p in matrices],
            )
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)  # Nesterov's
            updates = orthogonalized(torch.stack([v.flatten(1) for v in ahead]), self.dtype)
            updates = updates * (group["lr"] * 0.2 * math.sqrt(max(shape)))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(
                matrices, [v.view_as(p) for p, v in zip(matrices, updates, strict=True)]
            )
            for p in matrices:
                p.grad = None  # AdamW passes over it
        super().step()


def orthogonalized(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T of each matrix U S V^T, [..., R, C], roughly: its singular values are 0.7 to 1.2 (Newton-Schulz)."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = (wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide is matrices else x.mT).to(matrices.dtype)
