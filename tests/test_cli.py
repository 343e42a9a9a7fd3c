"""What every script does around its work: arguments, the device, errors in one line, words that must not stop it."""

import argparse
import errno
import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import cli
from cli import SEED, add_data, add_device, integer, number, parser, path, pick_device, provenance

import pytest
import torch
from scripts import ENVIRONMENT, REPOSITORY

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("parse, text, value", [
    (integer(1), "1", 1),
    (integer(1), "2147483647", 2**31 - 1),
    (integer(1), "0", "at least 1, got 0"),
    (integer(1), "2147483648", "at most 2147483647, got 2147483648"),
    (integer(2, 5), "5", 5),
    (integer(2, 5), "6", "at most 5, got 6"),
    (integer(2, 5), "1", "at least 2, got 1"),
    (integer(1), "1.5", ValueError),
    (integer(1), "", ValueError),
    (SEED, "4294967295", 2**32 - 1),
    (SEED, "4294967296", "at most 4294967295"),
    (SEED, "-1", "at least 0"),
    (number(0), "0", 0.0),
    (number(0), "1e300", 1e300),
    (number(0), "-0.1", "at least 0, got -0.1"),
    (number(0), "inf", "at least 0, got inf"),
    (number(0), "nan", "at least 0, got nan"),
    (number(0), "x", ValueError),
    (number(0, above=True), "0", "above 0, got 0"),
    (number(0, above=True), "1e-9", 1e-9),
    (number(0, 1), "1", 1.0),
    (number(0, 1), "1.1", "at least 0 and at most 1, got 1.1"),
    (path(), "a/b.txt", Path("a/b.txt")),
    (path(), "", "is empty"),
    (path(), " ", "is empty"),
    (path(".png"), "x.png", Path("x.png")),
    (path(".png"), "x.jpg", "must end in .png, got x.jpg"),
    (path(".png"), "png", "must end in .png"),
])  # fmt: skip
def test_types_of_arguments(parse, text, value):
    if value is ValueError:  # argparse then says: invalid integer value
        with pytest.raises(ValueError):
            parse(text)
    elif isinstance(value, str):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert value in str(error.value)
    else:
        result = parse(text)
        assert result == value and type(result) is type(value)


def test_names_of_types_in_messages(capsys):
    p = parser("text\n  kept as it is")
    assert "text\n  kept as it is" in p.format_help()
    for flag, kind in (("--i", integer(1)), ("--n", number(0))):
        p.add_argument(flag, type=kind)
    for arguments, words in (
        (["--i", "x"], "invalid integer value: 'x'"),
        (["--n", "x"], "invalid number value: 'x'"),
    ):
        with pytest.raises(SystemExit):
            p.parse_args(arguments)
        assert words in capsys.readouterr().err


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path(".png")("~/x.png") == tmp_path / "x.png"


def test_shared_flags():
    p = parser(None)
    add_data(p.add_argument)
    add_device(p.add_argument)
    assert vars(p.parse_args([])) == {"data": "auto", "data_root": Path("data"), "device": "auto"}
    given = p.parse_args(["--data", "mnist", "--data-root", "x", "--device", "cpu"])
    assert vars(given) == {"data": "mnist", "data_root": Path("x"), "device": "cpu"}


# ---------------------------------------------------------------------------------------------------------------------
# The device


@pytest.mark.parametrize(
    "cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device(cuda, mps, best, monkeypatch):
    """Found by asking torch, and tried before the work."""
    tried, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda n, device: tried.append(device) or zeros(n))
    assert pick_device() == torch.device(best) and tried == [best]
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "", "meta"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="can't be used here") as error:
        pick_device(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Running a script


def run(main, *args) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of cli.run."""
    before = warnings.formatwarning
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            with pytest.raises(SystemExit) as end:
                cli.run(main, *args)
        finally:
            warnings.formatwarning = before
    return end.value.code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("error, line", [
    (ValueError("too\nlong"), "too"),
    (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
    (RuntimeError("out of memory"), "out of memory"),
    (MemoryError(), "MemoryError"),
    (OverflowError("too large"), "too large"),
    (ImportError("No module named 'mlxtend'"), "No module named 'mlxtend'"),
    (ValueError("\n"), "ValueError"),
])  # fmt: skip
def test_errors_are_one_line(error, line, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    assert run(main) == (1, "", f"script.py: error: {line}\n")
    assert run(main, "process 3: ") == (1, "", f"script.py: error: process 3: {line}\n")


def test_mistakes_of_ours_keep_their_traceback():
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        pytest.raises(ZeroDivisionError),
    ):
        cli.run(lambda: 1 / 0)


def test_exit_codes():
    assert run(lambda: print("said")) == (None, "said\n", "")
    assert run(lambda: 143)[0] == 143
    assert run(lambda: (_ for _ in ()).throw(KeyboardInterrupt))[0] == 130


# A real process around main's body. Without torch, which takes seconds to load and which nothing here needs.
PROGRAM = f"""
import sys, types
sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["torch"] = types.SimpleNamespace(device=None)
import cli
def main():
    BODY
cli.run(main)
"""


def process(body: str, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT} | options
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("BODY", body)], timeout=120, **options
    )


def test_warnings_are_one_line():
    done = process("import warnings; warnings.warn('careful'); print('said')")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"said\n", b"warning: careful\n")


def test_letters_that_a_code_page_lacks():
    """On stdout and stderr, in a script's own words and in an error's."""
    done = process(
        "print('±1 é'); raise ValueError('±')", env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 1 and done.stdout == b"?1 ?\n" and done.stderr == b"-c: error: ?\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk():
    """Work goes on, the exit code is its own, and nobody complains at the end."""
    for code in ("", "return 7"):
        with open("/dev/full", "w") as full:
            done = process(f"for i in range(10**5): print('line', i)\n    {code}", stdout=full)
        assert done.returncode == (7 if code else 0) and done.stderr == b""


def test_a_reader_that_has_gone():
    read, write = os.pipe()
    os.close(read)
    done = process("print('x' * 10**6); print('more'); return 3", stdout=write)
    os.close(write)
    assert done.returncode == 3 and done.stderr == b""


def test_stdout_that_is_closed():
    done = process("print('x', flush=True); return 3", stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == 3 and done.stderr == b""


def test_a_line_reaches_the_log_when_it_is_written():
    """Into a pipe, which Python would fill by the block: it is there though the process is killed."""
    done = process("print('hello'); import os; os.kill(os.getpid(), 9)")
    assert done.returncode == -9 and done.stdout == b"hello\n"


def test_what_a_stream_can_do_it_still_can():
    stream = io.StringIO()
    wrapped = cli.Unbreakable(stream)
    assert wrapped.write("abc") == 3 and stream.getvalue() == "abc"
    assert not wrapped.isatty() and wrapped.getvalue() == "abc"
    stream.close()
    assert wrapped.write("abc") == 3
    wrapped.flush()


# ---------------------------------------------------------------------------------------------------------------------


def test_provenance(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train.py", "--out-dir", "a b"])
    origin = provenance()
    assert origin.keys() == {"command", "machine", "torch", "commit"}
    assert origin["command"] == "python train.py --out-dir 'a b'"
    assert origin["torch"] == torch.__version__
    assert (
        f"{torch.get_num_threads()} of {os.cpu_count()} cores" in origin["machine"]
        and origin["machine"][0] != ","
    )
    head = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if head:
        assert (
            head.startswith(origin["commit"].removesuffix("-dirty")) and len(origin["commit"]) >= 7
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert provenance()["machine"].startswith("A GPU, ")
    monkeypatch.setattr(cli, "REPOSITORY", Path("/"))
    assert provenance()["commit"] == "unknown"
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == "unknown"


def test_waiting_threads_sleep():
    """Whoever imports a script's room before torch gets it; who has chosen keeps his choice."""
    for before, after in ((None, b"PASSIVE\n"), ("ACTIVE", b"ACTIVE\n")):
        environment = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": before} if before else {}
        done = process("import os; print(os.environ['OMP_WAIT_POLICY'])", env=environment)
        assert done.stdout == after
