"""The training step and its state: weights and their average, optimizer, noise."""

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

from dataset import stream_seed
from diffusion import DiscreteDiffusion
from model import accelerated

OPTIMIZERS = ("muon", "adamw", "adam")
DECAYS = ("late", "cosine", "constant")
WARMUP_STEPS = 100
LATE = 0.3  # share of the steps in the late decay
BETAS = 0.9, 0.99  # of AdamW
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Processes:
    """The rank of this process, its rank on this machine, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read torchrun's variables. Raises ValueError if some are missing or invalid."""
        text = [os.environ.get(name) or "" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        if not any(text):
            return cls()
        numbers = [int(one) if one.isdecimal() else -1 for one in text]
        if not 0 <= numbers[1] <= numbers[0] < numbers[2]:
            values = ", ".join(map(repr, text))
            raise ValueError(f"RANK, LOCAL_RANK, WORLD_SIZE are {values}: torchrun sets all three")
        return cls(*numbers)

    def start(self, device: torch.device) -> torch.device:
        """Connect to the other processes, if any. Returns the device of this process."""
        if self.size == 1:
            return device
        if device.type == "cuda":
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return device

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over all processes. A sync point: all must call it."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums / self.size).tolist()

    def average_gradients(self, network: nn.Module) -> None:
        """Replace each gradient by its mean over all processes. A sync point, like `mean`.

        DistributedDataParallel turned gradients of a compiled bfloat16 network on CPUs into NaN.
        """
        if self.size > 1:
            gradients = [p.grad for p in network.parameters()]
            together = torch.cat([g.flatten() for g in gradients]) / self.size
            dist.all_reduce(together)
            parts = together.split([g.numel() for g in gradients])
            for g, part in zip(gradients, parts, strict=True):
                g.copy_(part.view(g.shape))

    def share(self, batch_size: int) -> slice:
        """This rank's slice of a batch. Raises ValueError if the slices would not be equal."""
        part, rest = divmod(batch_size, self.size)
        if rest:
            problem = f"the batch of {batch_size} can't be shared equally"
            raise ValueError(f"{problem} by {self.size} processes")
        return slice(self.rank * part, (self.rank + 1) * part)


class Trainer:
    """Trains the network of a diffusion.

    Args:
        diffusion: its network is trained. It is on the right device, the same in every process.
        total_steps: the length of the learning rate schedule.
        batch_size: images per step, over all processes.
        lr, decay: the peak learning rate and its decay; see `learning_rate`.
        weight_decay: of Muon and AdamW.
        label_dropout: the share of labels that is hidden from a network that takes labels.
        seed: seed of the noise.
        amp, compiled: run the network in bfloat16; compile it.

    Attributes:
        network, averaged: the network in training; the diffusion around its averaged weights.
        steps: the number of steps done.
        source: the device where noise is drawn. Batches that are already there save a copy.

    Raises:
        ValueError: for Muon without `hidden_matrices`, or a batch that can't be shared equally.
    """

    def __init__(
        self,
        diffusion: DiscreteDiffusion,
        total_steps: int,
        batch_size: int = 128,
        lr: float = 1e-4,
        optimizer: str = "adamw",
        decay: str = "late",
        weight_decay: float = 0.01,
        label_dropout: float = 0.1,
        seed: int = 0,
        amp: bool = False,
        compiled: bool = False,
        processes: Processes = Processes(),
    ):
        self.network, self.steps, self.total_steps = diffusion.model, 0, total_steps
        self.lr, self.decay, self.label_dropout, self.seed = lr, decay, label_dropout, seed
        self.processes, self.shard = processes, processes.share(batch_size)
        self.diffusion = diffusion.around(accelerated(self.network, amp, compiled))
        self.averaged = diffusion.around(copy.deepcopy(self.network)).eval()
        self.network.train()
        self.device = next(self.network.parameters()).device
        self.source = self.device if self.device.type == "cuda" else torch.device("cpu")
        # Unless its config says that it has no dropout, a network may draw random numbers.
        self.draws = getattr(self.network, "config", {}).get("dropout", 1) > 0
        self.records = self.device.type == "cuda" and processes.size == 1
        if self.records:
            torch.cuda.set_device(self.device)
        # A CUDA graph reads the rate from where it was in memory during the capture.
        self.rate = torch.tensor(lr, device=self.device) if self.records else lr
        options = {"lr": self.rate, "capturable": self.records, "foreach": True}
        parameters = self.network.parameters()
        adamw = options | {"betas": BETAS, "weight_decay": weight_decay}
        self.optimizer: torch.optim.Optimizer
        if optimizer == "adam":
            self.optimizer = torch.optim.Adam(parameters, **options)
        elif optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, **adamw)
        else:
            self.optimizer = Muon(self.network, **adamw)
        self.update = Recorded(self._update) if self.records else self._update

    def step(self, x_0: Tensor, y: Tensor | None = None, maps: Tensor | None = None) -> Tensor:
        """Train on one batch: x_0 [B, 1, H, W], labels y [B], and maps [B, 6] if it is augmented.

        Every rank passes the whole batch.

        Returns the loss, a detached scalar. The noise depends on (seed, step) alone, also in a
        resumed run and for any number of processes. CUDA and CPU draw different numbers.
        """
        inputs = self._draw_noise(x_0, y)
        if maps is not None:
            inputs["maps"] = maps[self.shard].to(self.device)
        rate = learning_rate(self.lr, self.steps, self.total_steps, self.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.fill_(rate) if self.records else rate
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.draws):  # for dropout
            if self.draws:  # each rank draws its own masks
                torch.manual_seed(stream_seed(self.seed, 3, self.steps, self.shard.start))
            loss = self.update(**inputs)
        move_average(self.averaged.model, self.network, self.steps)
        self.steps += 1
        return loss

    def _draw_noise(self, x_0: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """This rank's slices of x_0, t, uniforms and labels (if any), on the network's device."""
        seed = stream_seed(self.seed, 0, self.steps)
        generator = torch.Generator(self.source).manual_seed(seed)
        t = self.diffusion.draw_t(len(x_0), generator)
        u = torch.rand(x_0.shape, generator=generator, device=self.source)
        inputs = {"x_0": x_0, "t": t, "u": u}
        if self.diffusion.num_labels:
            hidden = torch.rand(len(x_0), generator=generator, device=self.source)
            y = torch.full((len(x_0),), -1) if y is None else y
            inputs["y"] = y.to(self.source).masked_fill(hidden < self.label_dropout, -1)
        return {name: v[self.shard].to(self.device) for name, v in inputs.items()}

    def _update(self, **inputs: Tensor) -> Tensor:
        """Loss, gradient, optimizer. Captured in a CUDA graph, so it must not sync."""
        loss = self.diffusion.loss(**inputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.processes.average_gradients(self.network)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.detach()

    def validate(self, x_0: Tensor) -> float:
        """The averaged network's mean bound, in nats per image, always with the same noise."""
        generator = torch.Generator().manual_seed(0)
        return self.averaged.variational_bound(x_0, 1, generator).mean().item()

    def state_dict(self) -> dict:
        return {
            "weights": self.network.state_dict(),
            "averaged_weights": self.averaged.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`. Raises ValueError if network or optimizer differ."""
        try:
            self.network.load_state_dict(state["weights"])
            self.averaged.model.load_state_dict(state["averaged_weights"])
            saved = state["optimizer"]  # maybe from another device type or an older version
            ours = {"capturable": self.records, "foreach": True}
            groups = [group | ours for group in saved["param_groups"]]
            self.optimizer.load_state_dict(saved | {"param_groups": groups})
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            message = "the run to resume does not fit this version of the repository"
            raise ValueError(f"{message}: {reason}") from None
        self.steps = state["step"]
        if self.records:
            self.update = Recorded(self._update)  # the old graph uses the old state's memory


def learning_rate(peak: float, step: int, total: int, decay: str = "late") -> float:
    """The rate at `step`, 0..total-1: a warm-up of 100 steps (at most total // 10), then `decay`.

    late: constant, then linear to 0 over the last 30 % of the steps. cosine: half a cosine over all
    steps. constant: no decay.
    """
    rate = peak * min(1.0, (step + 1) / max(1, min(WARMUP_STEPS, total // 10)))
    if decay == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total))
    return rate * min(1.0, max(0, total - step) / (LATE * total)) if decay == "late" else rate


def decay_start(total: int) -> int:
    """The first step of the late decay."""
    return math.ceil((1 - LATE) * total)


@torch.no_grad()
def move_average(averaged: nn.Module, current: nn.Module, n: int) -> None:
    """Exponential moving average over about the last ninth of n steps, at most 1,000."""
    decay = min(0.999, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_(list(averaged.parameters()), list(current.parameters()), 1 - decay)
    for a, c in zip(averaged.buffers(), current.buffers(), strict=True):
        a.lerp_(c, 1 - decay) if a.is_floating_point() else a.copy_(c)


class Recorded:
    """Captures a function of CUDA tensors as a CUDA graph and replays it.

    A step's thousand kernels take longer to launch than to run. The first WARMUP calls run without
    the graph, to compile and allocate. All calls must have the same shapes.
    """

    WARMUP = 3

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()

    def __call__(self, **inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARMUP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                # torch warns about a capturable optimizer outside a graph.
                warnings.filterwarnings("ignore", ".*capturable=True")
                result = self.function(**inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.WARMUP + 1:
            self.inputs = {name: v.clone() for name, v in inputs.items()}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.function(**self.inputs)
        for name, recorded in self.inputs.items():
            recorded.copy_(inputs[name])
        self.graph.replay()
        return self.result.clone()


class Muon(torch.optim.AdamW):
    """AdamW, but hidden matrices step along their orthogonalized momentum (Jordan et al. 2024).

    Updates have AdamW's typical size, so that one learning rate fits both (Liu et al. 2025,
    arXiv:2502.16982). torch.optim.Muon does not support convolutions. Raises ValueError if the
    network has no `hidden_matrices()`.
    """

    MOMENTUM = 0.95

    def __init__(self, network: nn.Module, **options):
        if not hasattr(network, "hidden_matrices"):
            name = type(network).__name__
            raise ValueError(f"muon needs a network with hidden_matrices(), which {name} lacks")
        super().__init__(network.parameters(), **options)
        self.by_side: dict[int, list[nn.Parameter]] = defaultdict(list)  # one batch per side
        for p in network.hidden_matrices():
            self.by_side[min(p.flatten(1).shape)].append(p)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for matrices in self.by_side.values():
            for p in matrices:
                if p not in self.state:  # AdamW expects "step" in each state that it loads
                    self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            gradients = [p.grad for p in matrices]
            momenta = [self.state[p]["momentum"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            nesterov = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)
            # Channels last, as in memory
            updates = orthogonalized([v.movedim(1, -1).flatten(1) for v in nesterov])
            sizes = [0.2 * math.sqrt(max(v.shape)) for v in updates]
            updates = torch._foreach_mul(torch._foreach_mul(updates, sizes), group["lr"])
            shapes = [p.movedim(1, -1).shape for p in matrices]
            updates = [v.reshape(s).movedim(-1, 1) for v, s in zip(updates, shapes, strict=True)]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(matrices, updates)
            for p in matrices:
                p.grad = None  # AdamW skips parameters without a gradient
        super().step()


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Approximate U V^T of each matrix U S V^T by five Newton-Schulz steps.

    The results have singular values between 0.7 and 1.2. The shorter sides must be equal. Each step
    is X <- p(X X^T) X with a polynomial p, so we iterate on the small X X^T alone and multiply X
    only once, by the product of the polynomials.
    """

    def polynomial(square: Tensor) -> Tensor:
        result = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        result.diagonal(dim1=1, dim2=2).add_(3.4445)
        return result

    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]
    square = torch.stack([x @ x.mT for x in wide])
    p = product = polynomial(square)
    for _ in range(4):
        square = p @ square @ p
        p = polynomial(square)
        product = p @ product
    results = [p @ x for p, x in zip(product, wide, strict=True)]
    return [v if v.shape == x.shape else v.mT for v, x in zip(results, matrices, strict=True)]
