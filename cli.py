"""Shared by all scripts: arguments, the device, one-line errors. Import it before torch."""

import argparse
import contextlib
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent

# OpenMP reads these when torch loads. On an idle machine, threads that spin for a while before they
# sleep are up to a third faster; beside a busy program they are slower. Set only for our own
# scripts, not for programs that import us; what the user has set wins.
SPIN, SLEEP = {"GOMP_SPINCOUNT": "10000"}, {"OMP_WAIT_POLICY": "PASSIVE"}
load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
WAITING = SPIN if load < (os.cpu_count() or 1) / 2 else SLEEP
script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")
ours = script.resolve().parent in (REPOSITORY, REPOSITORY / "experiments")
if ours and not os.environ.keys() & (SPIN | SLEEP).keys():
    os.environ.update(WAITING)

import torch  # noqa: E402 (the variables come first)


class UserError(ValueError):
    """A user's mistake: `run` prints its message in one line, without a traceback."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError into a UserError, where objects are built from flags or files."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


class Unbreakable:
    """An output stream that ignores errors such as a closed pipe or a full disk."""

    def __init__(self, stream):
        # Python sets a closed stream to None.
        self.stream = stream = stream or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            # Unsupported characters become "?"; a log shows each line at once.
            stream.reconfigure(errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and exit with its code.

    For UserError, OSError and lack of memory, print one line (under torchrun with the rank) and
    exit with 1. Ctrl-C exits with 130. Any other exception is a bug and gets a traceback.
    """
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        no_memory = "out of memory" in text or "DefaultCPUAllocator" in text  # GPU, CPU
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        rank = f"process {os.environ['RANK']}: " if os.environ.get("RANK") else ""
        print(f"{Path(sys.argv[0]).name}: error: {rank}{text.splitlines()[0]}", file=sys.stderr)
        code = 1
    sys.exit(code)


def catch_signals() -> list[int]:
    """The signals received: the first lets the step end and saves, the second aborts at once."""
    received: list[int] = []

    def on_signal(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, on_signal)
    return received


# -- arguments -------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    kept_lines = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=kept_lines)


def number(
    low: float, high: float = math.inf, above: bool = False, kind: type = float
) -> Callable[[str], float]:
    """Argument type: a finite number, at least low (above it if `above`), at most high."""

    def parse(text: str) -> float:
        value = kind(text)
        bound = f"at most {high}" if value > high else f"{'above' if above else 'at least'} {low}"
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    parse.__name__ = "integer" if kind is int else "number"  # argparse prints it
    return parse


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    return number(low, high, kind=int)


def path(suffix: str = "") -> Callable[[str], Path]:
    """Argument type: a path that ends in `suffix`; ~ is expanded."""

    def parse(text: str) -> Path:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty (an unset variable?)")
        value = Path(os.path.expanduser(text))  # "~nobody" stays as it is
        if suffix and value.suffix != suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, got {text}")
        return value

    parse.__name__ = "path"
    return parse


SEED = integer(0, 2**32 - 1)


def add_last_step(add: Callable, choices: tuple[str, ...]) -> None:
    words = """the last step, x_0 given x_1: mode takes the most probable (fewer stray pixels), draw
        samples (the model of the bound); default: mode for the mixture, draw for the joint form"""
    add("--last-step", choices=choices, help=words)


def add_device(add: Callable) -> None:
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best one)")


def add_speed(add: Callable) -> None:
    switch = {"action": "store_true", "default": False}
    add("--compile", **switch, help="compile the network: takes minutes, for long runs")
    add("--amp", **switch, help="use bfloat16: faster on recent GPUs and CPUs with AMX")


def add_data(add: Callable, default: str | None = "auto") -> None:
    words = f"""a folder of pictures, its sub-folders the classes; auto: MNIST from --data-root
        or a download, else 5,000 offline digits; mnist: no fallback; offline: those 5,000; fashion,
        kmnist: as mnist (default {default or "what the model was trained on"})"""
    root, metavar, check = Path("data"), "NAME|FOLDER", path()  # which refuses an unset variable
    kind = lambda text: check(text) and os.path.expanduser(text)  # noqa: E731 ("./mnist": a folder)
    add("--data", type=kind, default=default, metavar=metavar, help=words)
    add("--data-root", type=path(), default=root, help="folder of downloads (default data)")


def pick_device(name: str = "auto") -> torch.device:
    """The device `name`; "auto" is CUDA, MPS or the CPU. Raises UserError if it can't be used."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=name).cpu()  # fails now, not later
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0][:200]
        raise UserError(f"device {name!r} can't be used here: {reason}") from None


# --------------------------------------------------------------------------------------------------


def provenance() -> dict[str, str]:
    """Where a number comes from: command, GPU (if any) and CPU, torch version, our commit."""
    chips = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux has a better name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chips = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    with contextlib.suppress(RuntimeError):  # the GPU may be in exclusive use
        chips = f"{torch.cuda.get_device_name()}, {chips}" if torch.cuda.is_available() else chips
    # Name both folders, or git may use an enclosing repository or GIT_DIR.
    git = ["git", "--git-dir", REPOSITORY / ".git", "--work-tree", REPOSITORY]
    git += ["describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    command = shlex.join(["python", *sys.orig_argv[1:]])
    machine = f"{chips}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {"command": command, "machine": machine, "torch": torch.__version__, "commit": commit}
