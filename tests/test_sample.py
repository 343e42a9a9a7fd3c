"""sample.py and visualize_denoising.py: which digits, drawn how, into which files, and what is refused."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import call, fail, files, start, succeed, untrained

import sample
import visualize_denoising
from checkpoint import RELEASED, TIMESTEPS, load_checkpoint
from diffusion import DiscreteDiffusion
from pictures import image_grid, titled_frame

pytestmark = pytest.mark.usefixtures("fresh_directory")
BOTH = pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    path = tmp_path_factory.mktemp("conditional") / "c.pth"
    return path, untrained(path, config={"num_labels": 10})


def draw(*arguments) -> torch.Tensor:
    """What sample.py draws with these arguments."""
    succeed("sample.py", *arguments, "--out", "x.png", "--save-tensor", "x.pt", "--device", "cpu")
    return torch.load("x.pt", weights_only=True)


def frames(path="denoising_process.gif") -> tuple[list[np.ndarray], list[int], int]:
    """The frames of a GIF, their durations in milliseconds, and how often it loops (0: for ever)."""
    with Image.open(path) as gif:
        images, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            images.append(np.asarray(gif.convert("L")))
        return images, durations, gif.info["loop"]


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_sample_writes_picture_and_tensor(run):
    """The default name, the digits {0, 1} as uint8 [n, 1, 32, 32], and a picture of exactly these digits."""
    checkpoint = run / "checkpoints" / "model_epoch_4.pth"
    out = succeed(
        "sample.py", checkpoint, "--n", 5, "--save-tensor", "new/digits.pt", "--device", "cpu"
    )
    assert out.splitlines() == [
        "Wrote d3pm_generated_samples_model_epoch_4.png",
        "Wrote new/digits.pt",
    ]
    digits = torch.load("new/digits.pt", weights_only=True)
    assert digits.shape == (5, 1, 32, 32) and digits.dtype == torch.uint8
    assert torch.equal(digits, load_checkpoint(checkpoint).sample(5, last_step="mode"))
    with Image.open("d3pm_generated_samples_model_epoch_4.png") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(picture, image_grid(digits))
    assert files(Path()) == {"d3pm_generated_samples_model_epoch_4.png", "new/digits.pt"}


def test_sixteen_by_default(run):
    assert draw(run / "checkpoints" / "last.pth").shape[0] == 16


def test_image_i_does_not_depend_on_the_call(run, monkeypatch):
    """--n, --first and --batch-size choose which images are drawn, not what they look like; --seed does."""
    checkpoint = run / "checkpoints" / "last.pth"
    sheet = draw(checkpoint, "--n", 7)
    assert len(sheet.unique(dim=0)) == 7
    sizes, process = [], DiscreteDiffusion.reverse_process
    monkeypatch.setattr(
        DiscreteDiffusion,
        "reverse_process",
        lambda d, n, *a, **k: sizes.append(n) or process(d, n, *a, **k),
    )
    assert torch.equal(draw(checkpoint, "--n", 7, "--batch-size", 3), sheet)
    assert sizes == [3, 3, 1]
    assert torch.equal(draw(checkpoint, "--n", 2, "--first", 5), sheet[5:])
    assert not torch.equal(draw(checkpoint, "--n", 1, "--seed", 1), sheet[:1])
    assert torch.equal(
        draw(checkpoint, "--n", 1, "--seed", 1),
        load_checkpoint(checkpoint).sample(1, seed=1, last_step="mode"),
    )


def test_classes_guidance_and_timesteps(conditional):
    """By default in 30 steps, image i of class i mod 10, the mode of the last step, no guidance; each flag changes its
    own part of that."""
    path, d = conditional
    assert TIMESTEPS == 30
    usual, few, y = d.respaced(30), d.respaced(5), torch.arange(4)
    assert torch.equal(draw(path, "--n", 4), usual.sample(4, y=y, last_step="mode"))
    assert torch.equal(
        draw(path, "--n", 4, "--first", 3), usual.sample(4, first=3, y=y + 3, last_step="mode")
    )
    threes = torch.full((4,), 3)
    assert torch.equal(
        draw(path, "--n", 4, "--digit", 3), usual.sample(4, y=threes, last_step="mode")
    )
    assert torch.equal(draw(path, "--n", 4, "--last-step", "draw"), usual.sample(4, y=y))
    five = path, "--n", 4, "--timesteps", 5, "--last-step", "draw"
    assert torch.equal(draw(*five, "--guidance", 2), few.sample(4, y=y, guidance=2))
    assert torch.equal(draw(*five, "--digit", 3, "--guidance", 0), few.sample(4, y=threes))
    assert torch.equal(draw(*five, "--digit", "none"), few.sample(4))
    assert torch.equal(
        draw(path, "--n", 2, "--timesteps", 60), d.sample(2, y=y[:2], last_step="mode")
    )
    assert not torch.equal(few.sample(4), few.sample(4, y=threes))
    assert not torch.equal(few.sample(4, y=threes), few.sample(4, y=threes, guidance=2))


def test_a_row_of_each_class(conditional):
    path, d = conditional
    flags = "--digit", "0123456789", "--timesteps", 2
    images = draw(path, *flags, "--n", 3)
    y = torch.arange(10).repeat_interleave(3)
    assert torch.equal(images, d.respaced(2).sample(30, y=y, last_step="mode"))
    with Image.open("x.png") as picture:
        assert picture.size == (2 * (3 * 34 + 2), 2 * (10 * 34 + 2))
        assert np.array_equal(picture, image_grid(images, columns=3))
    assert len(draw(path, *flags)) == 100  # ten of each by default


def test_levels_of_grey():
    """What is drawn and what is given of a digit (--fill) has the levels of the checkpoint, in both scripts."""
    d = untrained("x.pth", timesteps=3, config={"num_levels": 4, "num_states": 4})
    images = draw("x.pth", "--n", 4)
    assert torch.equal(images, d.sample(4, last_step="mode"))
    with Image.open("x.png") as picture:
        assert np.array_equal(picture, image_grid(images, 4)) and len(np.unique(picture)) == 5
    grey = np.arange(32 * 32).reshape(32, 32) * 255 // 1023
    alpha = np.where(np.arange(32) < 16, 255, 0) + np.zeros_like(grey)
    Image.fromarray(np.stack([grey, alpha], 2).astype(np.uint8), "LA").save("part.png")
    known = torch.where(torch.from_numpy(alpha) > 0, torch.from_numpy(grey * 4 // 256), -1)[
        None, None
    ]
    filled = d.sample(3, known=known, particles=2, last_step="mode")
    flags = "--fill", "part.png", "--particles", 2, "--n", 3
    assert torch.equal(draw("x.pth", *flags), filled)
    with Image.open("x.png") as picture:
        assert np.array_equal(picture, image_grid(torch.cat([known, filled.long()]), 4))
    succeed("visualize_denoising.py", "x.pth", *flags)
    assert np.array_equal(frames()[0][-1][24:], image_grid(filled, 4))


def test_outputs_are_checked_before_the_work(run, monkeypatch):
    """That they can be written, and that none is another or the checkpoint, by whatever name."""
    monkeypatch.setattr(
        DiscreteDiffusion, "sample", lambda *_, **__: pytest.fail("sampled for nothing")
    )
    shutil.copy(run / "checkpoints" / "last.pth", "x.pth")
    Path("file").write_text("")
    Path("link.pth").symlink_to("x.pth")
    os.link("x.pth", "hard.pth")
    assert "can't write" in fail(
        "sample.py", "x.pth", "--out", "a.png", "--save-tensor", "file/a.pt"
    )
    for a, b in (("a.png", "a.png"), ("a.png", "./a.png"), ("a.png", Path("a.png").resolve())):
        assert "the same file is written" in fail(
            "sample.py", "x.pth", "--out", a, "--save-tensor", b
        )
    for name in ("x.pth", "./x.pth", "link.pth", "hard.pth"):
        assert "the same file is read" in fail("sample.py", "x.pth", "--save-tensor", name)
    assert "the same file is read" in fail("sample.py", "link.pth", "--save-tensor", "x.pth")


def test_output_through_a_link(run):
    Path("link.png").symlink_to("target.png")
    succeed(
        "sample.py",
        run / "checkpoints" / "last.pth",
        "--n",
        1,
        "--out",
        "link.png",
        "--device",
        "cpu",
    )
    assert Path("link.png").is_symlink() and Path("target.png").stat().st_size > 0


def test_an_interrupted_drawing_leaves_nothing(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiscreteDiffusion, "sample", interrupted)
    code, _, err = call("sample.py", run / "checkpoints" / "last.pth", "--save-tensor", "x.pt")
    assert code == 130 and "Traceback" not in err and not list(Path().iterdir())


def test_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(run / "checkpoints", "home")
    succeed(
        "sample.py",
        "~/last.pth",
        "--out=~/x.png",
        "--save-tensor=~/x.pt",
        "--n",
        1,
        "--device",
        "cpu",
    )
    assert Path("home/x.png").exists() and Path("home/x.pt").exists() and not Path("~").exists()


# ---------------------------------------------------------------------------------------------------------------------
# visualize_denoising.py


def test_gif_shows_the_whole_reverse_process(run):
    """T + 1 frames that loop, the last one held, titled by t: all that the reverse process goes through."""
    checkpoint = run / "checkpoints" / "last.pth"
    out = succeed("visualize_denoising.py", checkpoint, "--n", 4, "--seed", 3, "--device", "cpu")
    assert out.splitlines() == ["Wrote denoising_process.gif"]
    images, durations, loops = frames()
    assert loops == 0 and durations == [50] * 10 + [3000]
    chain = list(load_checkpoint(checkpoint).reverse_process(4, seed=3, last_step="mode"))
    for i, (frame, x_t) in enumerate(zip(images, chain, strict=True)):
        assert np.array_equal(frame, titled_frame(x_t, 2, f"t = {10 - i}"))
    assert len({frame[:24].tobytes() for frame in images}) == 11  # the title can be read


def test_fewer_timesteps(run):
    """The animation shows the respaced chain, by its original t, and ends in what sample.py draws with it."""
    checkpoint = run / "checkpoints" / "last.pth"
    flags = "--timesteps", 5, "--n", 4, "--device", "cpu"
    succeed("visualize_denoising.py", checkpoint, *flags)
    images = draw(checkpoint, *flags)
    d = load_checkpoint(checkpoint).respaced(5)
    assert torch.equal(images, d.sample(4, last_step="mode"))
    shown = frames()[0]
    assert len(shown) == 6 and np.array_equal(shown[-1][24:], image_grid(images))
    x_T = next(iter(d.reverse_process(4)))
    assert np.array_equal(shown[0], titled_frame(x_T, 2, "t = 10"))
    after_one = list(d.reverse_process(4))[1]
    assert (
        np.array_equal(shown[1], titled_frame(after_one, 2, f"t = {d.network_t[4]}"))
        and d.network_t[4] != 4
    )


def test_sixteen_digits_of_classes_in_turn(conditional):
    """The same digits as those of sample.py."""
    path, _ = conditional
    succeed("visualize_denoising.py", path, "--timesteps", 3, "--device", "cpu")
    assert np.array_equal(frames()[0][-1][24:], image_grid(draw(path, "--n", 16, "--timesteps", 3)))


@pytest.mark.parametrize("fps, duration, told", [
    (10, 100, None),
    (50, 20, None),
    (33.333, 30, None),
    (40, 20, "50 frames per second"),  # half a hundredth more or less: round to even
    (30, 30, "33.33 frames per second"),
    (1, 1000, None),
])  # fmt: skip
def test_rate_of_frames(fps, duration, told, run):
    """Hundredths of a second, as GIF has them; where that is another rate, it is said before the work."""
    checkpoint = run / "checkpoints" / "last.pth"
    out = succeed(
        "visualize_denoising.py",
        checkpoint,
        "--n",
        1,
        "--timesteps",
        2,
        "--fps",
        fps,
        "--device",
        "cpu",
    )
    assert frames()[1][:2] == [duration] * 2
    assert out.splitlines()[0].startswith(told) if told else len(out.splitlines()) == 1


def test_gif_elsewhere(run):
    """--out; and not over the checkpoint."""
    shutil.copy(run / "checkpoints" / "last.pth", "x.gif")
    succeed("visualize_denoising.py", "x.gif", "--n", 1, "--timesteps", 1, "--out", "new/y.gif")
    assert files(Path()) == {"x.gif", "new/y.gif"}
    assert "the same file is read" in fail("visualize_denoising.py", "x.gif", "--out", "x.gif")


# ---------------------------------------------------------------------------------------------------------------------
# Both


@BOTH
def test_without_a_checkpoint_the_released_one_is_used(script, run, monkeypatch):
    """And the script says so."""
    module = {"sample.py": sample, "visualize_denoising.py": visualize_denoising}[script]
    assert module.RELEASED == RELEASED and RELEASED.exists()
    monkeypatch.setattr(module, "RELEASED", run / "checkpoints" / "last.pth")
    out = succeed(script, "--n", 2)
    assert out.splitlines()[0] == f"Using the released model, {module.RELEASED}"
    assert not succeed(script, run / "checkpoints" / "model_epoch_4.pth", "--n", 2).startswith(
        "Using"
    )


@BOTH
def test_device(script, run, monkeypatch):
    module, asked = {"sample.py": sample, "visualize_denoising.py": visualize_denoising}[script], []
    pick = module.pick_device
    monkeypatch.setattr(module, "pick_device", lambda name: asked.append(name) or pick("cpu"))
    for flags in ([], ["--device", "tpu"]):
        succeed(script, run / "checkpoints" / "last.pth", "--n", 1, *flags)
    assert asked == ["auto", "tpu"]


@BOTH
def test_a_script_from_elsewhere(script, run, tmp_path):
    """Through a symbolic link, as a real process in another working directory: the same pictures."""
    suffix = "png" if script == "sample.py" else "gif"
    succeed(script, run / "checkpoints" / "last.pth", "--n", 2, "--out", f"here.{suffix}")
    Path("link.py").symlink_to(Path(sample.__file__).with_name(script))
    arguments = run / "checkpoints" / "last.pth", "--n", 2, "--out", f"there.{suffix}"
    process = start(tmp_path / "link.py", *arguments, cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert Path(f"here.{suffix}").read_bytes() == Path(f"there.{suffix}").read_bytes()


@BOTH
@pytest.mark.parametrize(
    "name", ["nowhere", "folder", "cut.pth", "noise.pth", "empty.pth", "other.pth", "tensor.pth"]
)
def test_bad_checkpoint(script, name, bad_files):
    """The message names the file."""
    assert name in fail(script, name)


@BOTH
def test_checkpoint_whose_weights_do_not_fit(script, bad_files):
    assert "misfit.pth does not fit" in fail(script, "misfit.pth")


@BOTH
@pytest.mark.parametrize("timesteps", [11, 0, -1])
def test_timesteps_that_training_did_not_have(script, timesteps, run):
    line = fail(script, run / "checkpoints" / "last.pth", "--timesteps", timesteps)
    assert "1..10" in line and str(timesteps) in line


@BOTH
@pytest.mark.parametrize("arguments", [
    "good.pth --n 0",
    "good.pth --n -1",
    "good.pth --n many",
    "good.pth --n 100000000000000000000",
    "good.pth --seed -1",
    "good.pth --seed 4294967296",
    "good.pth --timesteps many",
    "good.pth --device nonsense",
    "good.pth --out digits.jpg",
    "good.pth --out digits",
    "good.pth --out folder",
    "good.pth --out=",
    "good.pth --out cut.pth/digits.SUFFIX",
    "good.pth --out cut.pth/deeper/digits.SUFFIX",
    "good.pth nonsense",
])  # fmt: skip
def test_bad_input_to_both(script, arguments, bad_files):
    fail(script, *arguments.replace("SUFFIX", "png" if script == "sample.py" else "gif").split())


@pytest.mark.parametrize("arguments, words", [
    ("--batch-size 0", "at least 1"),
    ("--first -1", "at least 0"),
    ("--first 100000000000000000000", "at most"),
    ("--save-tensor folder", "not a regular file"),
    ("--save-tensor=", "is empty"),
    ("--digit 12", "invalid choice"),
    ("--digit x", "invalid choice"),
    ("--digit 3", "--digit: good.pth was trained without classes"),
    ("--digit none", "--digit: good.pth was trained without classes"),
    ("--guidance 1", "--guidance: good.pth was trained without classes"),
    ("--guidance 0", "--guidance: good.pth was trained without classes"),
    ("--digit 3 --guidance -1", "at least 0"),
    ("--digit none --guidance 1", "needs a class"),
])  # fmt: skip
def test_bad_input_to_sample(arguments, words, bad_files):
    assert words in fail("sample.py", "good.pth", *arguments.split())


@pytest.mark.parametrize("arguments", ["--fps 0", "--fps nan", "--fps 51", "--n 257"])
def test_bad_input_to_visualize(arguments, bad_files):
    assert "must be" in fail("visualize_denoising.py", "good.pth", *arguments.split())


@pytest.mark.parametrize(
    "script, suffix", [("sample.py", "png"), ("visualize_denoising.py", "gif")]
)
def test_unwritable_folder(script, suffix, bad_files):
    folder = Path("locked")
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "ermission denied" in fail(script, "good.pth", "--out", folder / f"digits.{suffix}")


def test_bad_input_to_a_real_process(tmp_path):
    """What `call` emulates, once for real: exit code 1 and a single line on stderr."""
    process = start("sample.py", "nowhere.pth", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("sample.py: error: ") and "nowhere.pth" in line
    assert not list(tmp_path.iterdir())
