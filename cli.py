"""What every script does around its own work: arguments, the device, errors in one line. Import it before torch."""

import argparse
import contextlib
import math
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

REPOSITORY = Path(__file__).resolve().parent


class Unbreakable:
    """A text stream whose reader may go away, or that may be full: what can't be said must not stop the work."""

    def __init__(self, stream):
        self.stream = stream = stream or open(os.devnull, "w")  # noqa: SIM115 (Python has none where it is closed)
        if hasattr(stream, "reconfigure"):
            # A code page without ± is no reason to fail either; a log shows each line when it is written.
            stream.reconfigure(errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # Python calls this once more at its end
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run(main: Callable[[], int | None], who: str = "") -> None:
    """Call a script's main and exit: 0, or one line on stderr and 1; `who` is put before an error's text."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    code: int | None = 1
    try:
        code = main()
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError, ImportError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{Path(sys.argv[0]).name}: error: {who}{line}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that takes integers low..high."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    parse.__name__ = "integer"
    return parse


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of an argument that takes finite numbers low..high; or, `above`, only those greater than low."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            bound = f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(
                f"must be {bound}{'' if math.isinf(high) else f' and at most {high:g}'}, got {text}"
            )
        return value

    parse.__name__ = "number"
    return parse


def path(suffix: str = "") -> Callable[[str], Path]:
    """The type of an argument that names a file or folder: ~ is the home folder; the name ends in `suffix`."""

    def parse(text: str) -> Path:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty (an unset variable?)")
        value = Path(text).expanduser()
        if value.suffix != suffix and suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, got {text}")
        return value

    parse.__name__ = "path"
    return parse


SEED = integer(0, 2**32 - 1)


def add_last_step(add: Callable, choices: tuple[str, ...], default: str) -> None:
    add("--last-step", choices=choices, default=default, help="take the most probable x_0 given x_1 (mode, as in the "
        "authors' code: fewer stray pixels), or draw it, as in the model that the bound is of (default "
        f"{default})")  # fmt: skip


def add_device(add: Callable) -> None:
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")


def add_speed(add: Callable, default: bool | None = False) -> None:
    add("--compile", action="store_true", default=default, help="compile the network first: takes a minute or more, so "
        "it pays in long runs")  # fmt: skip
    add("--amp", action="store_true", default=default, help="run the network in bfloat16: pays where the hardware has "
        "it (recent GPUs, and CPUs with AMX)")  # fmt: skip


def add_data(
    add: Callable, defaults: tuple[str | None, Path | None] = ("auto", Path("data"))
) -> None:
    add("--data", choices=["auto", "mnist", "offline"], default=defaults[0], help="auto (default): MNIST from "
        "--data-root or a download, else 5,000 offline digits; mnist: no fallback; offline: those 5,000")  # fmt: skip
    add(
        "--data-root",
        type=path(),
        default=defaults[1],
        help="where MNIST is or goes (default data)",
    )


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU. Raises ValueError if it can't be used."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.zeros(1, device=name).cpu()  # fails here rather than in the middle of the work
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} can't be used here: {str(error).split('. ')[0][:200]}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, str]:
    """Where a number comes from: the command, the machine, torch's version and the repository's commit."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux keeps the name that people know here
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            line.split(":")[1].strip() for line in lines if line.startswith("model name")
        )
    with contextlib.suppress(RuntimeError):  # somebody else's, perhaps
        processor = (
            f"{torch.cuda.get_device_name()}, {processor}"
            if torch.cuda.is_available()
            else processor
        )
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "machine": f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit,
    }
