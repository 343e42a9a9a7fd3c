"""sample.py and visualize_denoising.py: the images drawn, how, into which files, and errors."""

import os
import shutil
from pathlib import Path

import cli

import numpy as np
import pytest
import torch
from own import COLOURS, SIZE, own_model, palette_image
from PIL import Image
from scripts import call, fail, files, start, succeed, untrained

import sample
import visualize_denoising
from checkpoint import RELEASED, TIMESTEPS, load_checkpoint
from diffusion import DiscreteDiffusion
from pictures import image_grid, titled_frame
from trajectories import fill_in, respaced

pytestmark = pytest.mark.usefixtures("fresh_directory")
BOTH = pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])
SUFFIX = {"sample.py": ".png", "visualize_denoising.py": ".gif"}
MODULE = {"sample.py": sample, "visualize_denoising.py": visualize_denoising}
CPU = "--device", "cpu"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.pth"
    untrained(path, timesteps=10)
    return path


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    path = tmp_path_factory.mktemp("conditional") / "c.pth"
    return path, untrained(path, timesteps=31, config={"num_labels": 10})


def draw(path, flags="", device="cpu") -> torch.Tensor:
    """The tensor that sample.py writes with these flags."""
    flags = *flags.split(), "--device", device
    succeed("sample.py", path, *flags, "--out", "x.png", "--save-tensor", "x.pt")
    return torch.load("x.pt", weights_only=True)


def mode(d: DiscreteDiffusion, n, **kwargs) -> torch.Tensor:
    return d.sample(n, last_step="mode", **kwargs)


def frames(path="denoising_process.gif") -> tuple[list[np.ndarray], list[int], int]:
    """The frames of a GIF, their durations in milliseconds, and its loop count (0: forever)."""
    with Image.open(path) as gif:
        images, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            images.append(np.asarray(gif.convert("L")))
        return images, durations, gif.info["loop"]


def shows(path, grid) -> bool:
    with Image.open(path) as picture:
        return picture.format == "PNG" and np.array_equal(picture, grid)


def half_of_a_picture() -> torch.Tensor:
    """Write part.png, all greys, its left half known; return the known pixels as 256 levels."""
    grey = np.arange(32 * 32).reshape(32, 32) * 255 // 1023
    alpha = np.where(np.arange(32) < 16, 255, 0) + np.zeros_like(grey)
    Image.fromarray(np.stack([grey, alpha], 2).astype(np.uint8), "LA").save("part.png")
    return torch.where(torch.from_numpy(alpha) > 0, torch.from_numpy(grey), -1)[None, None]


# --------------------------------------------------------------------------------------------------
# sample.py


def test_sample_writes_picture_and_tensor(checkpoint):
    """The default name, digits {0, 1} as uint8 [n, 1, 32, 32], and their picture."""
    out = succeed("sample.py", checkpoint, "--n", 5, "--save-tensor", "new/digits.pt", *CPU)
    name = "d3pm_generated_samples_small.png"
    assert out.splitlines() == [f"Wrote {name}", "Wrote new/digits.pt"]
    digits = torch.load("new/digits.pt", weights_only=True)
    assert digits.shape == (5, 1, 32, 32) and digits.dtype == torch.uint8
    assert torch.equal(digits, mode(load_checkpoint(checkpoint), 5))
    assert shows(name, image_grid(digits)) and files(Path()) == {name, "new/digits.pt"}


def test_completions_have_their_own_name(checkpoint):
    half_of_a_picture()
    out = succeed("sample.py", checkpoint, "--fill", "part.png", "--particles", 1, "--n", 1, *CPU)
    assert out == "Wrote d3pm_completions_small.png\n" and Path(out.split()[1]).exists()


def test_image_i_does_not_depend_on_the_call(checkpoint, monkeypatch):
    """--n, --first and --batch-size select images; --seed changes them."""
    sheet = draw(checkpoint, "--n 7")
    assert len(sheet.unique(dim=0)) == 7
    sizes, process = [], DiscreteDiffusion.reverse_process

    def reverse_process(self, n, *args, **kwargs):
        sizes.append(n)
        return process(self, n, *args, **kwargs)

    monkeypatch.setattr(DiscreteDiffusion, "reverse_process", reverse_process)
    assert torch.equal(draw(checkpoint, "--n 7 --batch-size 3"), sheet) and sizes == [3, 3, 1]
    assert torch.equal(draw(checkpoint, "--n 2 --first 5"), sheet[5:])
    other = draw(checkpoint, "--n 1 --seed 1")
    assert not torch.equal(other, sheet[:1])
    assert torch.equal(other, mode(load_checkpoint(checkpoint), 1, seed=1))


def test_classes_guidance_and_timesteps(conditional):
    """Defaults: 30 steps, image i of class i mod 10, mode in the last step, no guidance. Each flag
    changes only its part."""
    path, d = conditional
    assert TIMESTEPS == 30
    usual, few, y = respaced(d, 30), respaced(d, 5), torch.arange(4)
    assert torch.equal(draw(path)[:4], mode(usual, 4, y=y)) and len(torch.load("x.pt")) == 16
    threes = torch.full((4,), 3)
    for flags, expected in (
        ("--first 3", mode(usual, 4, first=3, y=y + 3)),
        ("--digit 3", mode(usual, 4, y=threes)),
        ("--last-step draw", usual.sample(4, y=y)),
        ("--timesteps 5 --last-step draw --guidance 2", few.sample(4, y=y, guidance=2)),
        ("--timesteps 5 --last-step draw --digit 3 --guidance 0", few.sample(4, y=threes)),
        ("--timesteps 5 --last-step draw --digit none", few.sample(4)),
        ("--timesteps 31", mode(d, 4, y=y)),
    ):
        assert torch.equal(draw(path, f"--n 4 {flags}"), expected), flags
    assert not torch.equal(few.sample(4), few.sample(4, y=threes))
    assert not torch.equal(few.sample(4, y=threes), few.sample(4, y=threes, guidance=2))


def test_a_row_of_each_class(conditional):
    path, d = conditional
    flags = "--digit 0123456789 --timesteps 2"
    images = draw(path, f"{flags} --n 3")
    y = torch.arange(10).repeat_interleave(3)
    assert torch.equal(images, mode(respaced(d, 2), 30, y=y))
    assert shows("x.png", image_grid(images, columns=3))
    assert len(draw(path, flags)) == 100  # by default ten per class


def test_last_step_of_the_joint_form(checkpoint):
    """Both scripts draw it by default, as in the paper."""
    state = torch.load(checkpoint, weights_only=True)
    state["diffusion"]["reverse"] = "joint"
    torch.save(state, "joint.pth")
    d = load_checkpoint("joint.pth")
    drawn = d.sample(4)
    assert not torch.equal(drawn, mode(d, 4)) and torch.equal(draw("joint.pth", "--n 4"), drawn)
    assert torch.equal(draw("joint.pth", "--n 4 --last-step mode"), mode(d, 4))
    succeed("visualize_denoising.py", "joint.pth", "--n", 4, *CPU)
    assert np.array_equal(frames()[0][-1][24:], image_grid(drawn))


def test_levels_of_grey():
    """In both scripts, images and --fill have the levels of the checkpoint."""
    d = untrained("x.pth", timesteps=3, config={"num_levels": 4, "num_states": 4})
    images, known = draw("x.pth", "--n 4"), half_of_a_picture()
    assert torch.equal(images, mode(d, 4)) and shows("x.png", image_grid(images, 4))
    assert len(images.unique()) == 4
    known = torch.where(known < 0, -1, known * 4 // 256)
    filled = fill_in(d, known, 3, particles=2, last_step="mode")
    flags = "--fill part.png --particles 2 --n 3"
    assert torch.equal(draw("x.pth", flags), filled)
    assert shows("x.png", image_grid(torch.cat([known, filled.long()]), 4))
    succeed("visualize_denoising.py", "x.pth", *flags.split(), *CPU)
    assert np.array_equal(frames()[0][-1][24:], image_grid(filled, 4))


def test_outputs_are_checked_first(checkpoint, monkeypatch):
    """They must be writable, and differ from each other and the checkpoint, by any name."""
    worked = lambda *_, **__: pytest.fail("sampled for nothing")  # noqa: E731
    monkeypatch.setattr(DiscreteDiffusion, "sample", worked)
    shutil.copy(checkpoint, "x.pth")
    Path("file").write_text("")
    Path("link.pth").symlink_to("x.pth")
    os.link("x.pth", "hard.pth")
    flags = "--out", "a.png", "--save-tensor"
    assert "can't write" in fail("sample.py", "x.pth", *flags, "file/a.pt", *CPU)
    for name in ("a.png", "./a.png", Path("a.png").resolve()):
        assert "the same file is written" in fail("sample.py", "x.pth", *flags, name, *CPU)
    pairs = [("x.pth", name) for name in ("x.pth", "./x.pth", "link.pth", "hard.pth")]
    for path, name in [*pairs, ("link.pth", "x.pth")]:
        assert "the same file is read" in fail("sample.py", path, "--save-tensor", name, *CPU)


def test_output_through_a_link(checkpoint):
    Path("link.png").symlink_to("target.png")
    succeed("sample.py", checkpoint, "--n", 1, "--out", "link.png", *CPU)
    assert Path("link.png").is_symlink() and Path("target.png").stat().st_size > 0


def test_an_interrupted_run_leaves_nothing(checkpoint, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiscreteDiffusion, "sample", interrupted)
    code, _, err = call("sample.py", checkpoint, "--save-tensor", "x.pt", *CPU)
    assert code == 130 and "Traceback" not in err and not list(Path().iterdir())


def test_home_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(checkpoint.parent, "home")
    flags = "--out=~/x.png", "--save-tensor=~/x.pt", "--n", 1
    succeed("sample.py", "~/small.pth", *flags, *CPU)
    assert Path("home/x.png").exists() and Path("home/x.pt").exists() and not Path("~").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(checkpoint):
    """Reproducible, and equal to the CPU's images up to pixels decided by rounding."""
    images = draw(checkpoint, "--n 8", device="cuda")
    assert torch.equal(draw(checkpoint, "--n 8", device="cuda"), images)
    assert (images != draw(checkpoint, "--n 8")).double().mean() < 0.01


# --------------------------------------------------------------------------------------------------
# visualize_denoising.py


def test_gif_shows_the_whole_reverse_process(checkpoint):
    """T + 1 looping frames, titled by t; the last is held."""
    out = succeed("visualize_denoising.py", checkpoint, "--n", 4, "--seed", 3, *CPU)
    assert out.splitlines() == ["Wrote denoising_process.gif"]
    images, durations, loops = frames()
    assert loops == 0 and durations == [50] * 10 + [3000]
    chain = list(load_checkpoint(checkpoint).reverse_process(4, seed=3, last_step="mode"))
    for i, (frame, x_t) in enumerate(zip(images, chain, strict=True)):
        assert np.array_equal(frame, titled_frame(x_t, f"t = {10 - i}"))
    assert len({frame[:24].tobytes() for frame in images}) == 11  # the title can be read


def test_fewer_timesteps(checkpoint):
    """The respaced chain, titled by its original t, ending in sample.py's images."""
    flags = "--timesteps 5 --n 4"
    succeed("visualize_denoising.py", checkpoint, *flags.split(), *CPU)
    images, shown = draw(checkpoint, flags), frames()[0]
    d = respaced(load_checkpoint(checkpoint), 5)
    assert torch.equal(images, mode(d, 4))
    assert len(shown) == 6 and np.array_equal(shown[-1][24:], image_grid(images))
    x_T, after_one, *_ = d.reverse_process(4)
    t = d.network_t[4]
    assert np.array_equal(shown[0], titled_frame(x_T, "t = 10"))
    assert np.array_equal(shown[1], titled_frame(after_one, f"t = {t}")) and t != 4


def test_sixteen_digits_of_classes_in_turn(conditional):
    """The same digits as from sample.py."""
    path, _ = conditional
    succeed("visualize_denoising.py", path, "--timesteps", 3, *CPU)
    assert np.array_equal(frames()[0][-1][24:], image_grid(draw(path, "--n 16 --timesteps 3")))


@pytest.mark.parametrize("fps, duration", [(10, 100), (33.333, 30), (40, 20), (15, 70)])
def test_rate_of_frames(fps, duration, checkpoint):
    """Rounded to hundredths of a second: 2.5 to even, 6.67 up."""
    flags = "--n", 1, "--timesteps", 2, "--fps", fps
    succeed("visualize_denoising.py", checkpoint, *flags, *CPU)
    assert frames()[1][:2] == [duration] * 2


def test_gif_elsewhere(checkpoint):
    """--out, but not over the checkpoint."""
    shutil.copy(checkpoint, "x.gif")
    flags = "x.gif", "--n", 1, "--timesteps", 1, *CPU
    succeed("visualize_denoising.py", *flags, "--out", "new/y.gif")
    assert files(Path()) == {"x.gif", "new/y.gif"}
    assert "the same file is read" in fail("visualize_denoising.py", *flags, "--out", "x.gif")


# --------------------------------------------------------------------------------------------------
# Images of one's own


def colours(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_own_pictures_without_padding_and_in_colour():
    d = own_model()
    images, x_0 = draw("own.pth", "--n 3"), mode(d, 3)
    assert images.shape == (3, 1, *SIZE) and images.is_contiguous()
    assert torch.equal(images, x_0[:, :, 3:13, 1:7])
    sheet = colours(Image.open("x.png"))
    assert sheet.shape == (2 * (2 + 2 * 12), 2 * (2 + 2 * 8), 3)
    assert np.array_equal(sheet[4:24:2, 4:16:2], np.array(COLOURS)[images[0, 0]])
    succeed("visualize_denoising.py", "own.pth", "--n", 3, *CPU)
    with Image.open("denoising_process.gif") as gif:
        assert gif.n_frames == 5
        gif.seek(4)
        assert np.array_equal(colours(gif)[24:], sheet)


def test_filling_in_own_pictures():
    d, states = own_model(), np.arange(60).reshape(SIZE) % 5
    alpha = Image.fromarray(
        np.where(np.arange(10) < 5, 255, 0)[:, None].astype(np.uint8).repeat(6, 1)
    )
    part = palette_image(states).convert("RGBA")
    part.putalpha(alpha)
    part.putpixel((2, 9), (1, 2, 3, 0))  # unknown pixels may have any colour
    part.save("part.png")
    known = torch.zeros(1, 1, 16, 8, dtype=torch.long)  # the padding is known
    known[0, 0, 3:13, 1:7] = torch.tensor(np.where(np.arange(10)[:, None] < 5, states, -1))
    images = draw("own.pth", "--fill part.png --n 2 --particles 2")
    expected = fill_in(d, known, 2, particles=2, last_step="mode")
    assert torch.equal(images, expected[:, :, 3:13, 1:7])
    assert np.array_equal(images[0, 0, :5], states[:5])
    sheet = torch.cat([known, expected.long()])
    assert shows("x.png", image_grid(sheet, 5, palette=COLOURS, size=SIZE))
    succeed("visualize_denoising.py", "own.pth", "--fill", "part.png", "--n", 2, *CPU)
    part.putpixel((2, 1), (1, 2, 3, 255))
    part.save("foreign.png")
    Image.new("LA", (8, 16), 0).save("padded.png")
    for name, words in (
        ("foreign", "the colour (1, 2, 3), which"),
        ("padded", "8x16 pixels: give 6x10"),
    ):
        for script in ("sample.py", "visualize_denoising.py"):
            line = fail(script, "own.pth", "--fill", f"{name}.png", *CPU)
            assert f"{name}.png" in line and words in line


def test_classes_by_name_and_number():
    d = own_model(num_labels=2)
    for flags, y in (
        ("--class lake --n 2", [1, 1]),
        ("--class 0 --n 2", [0, 0]),
        ("--digit 1 --n 2", [1, 1]),
        ("--class all --n 2", [0, 0, 1, 1]),
        ("--n 3", [0, 1, 0]),
    ):
        images = mode(d, len(y), y=torch.tensor(y))
        assert torch.equal(draw("own.pth", flags), images[:, :, 3:13, 1:7]), flags
    assert torch.equal(draw("own.pth", "--class none --n 2"), mode(d, 2)[:, :, 3:13, 1:7])
    assert len(draw("own.pth", "--class all")) == 20
    for wrong in ("sea", "2", "-1", ""):
        line = fail("sample.py", "own.pth", f"--class={wrong}", *CPU)
        assert line.endswith(f"class {wrong!r}: choose from hill, lake; 0 to 1; all; none")
    assert "not allowed with" in fail("sample.py", "own.pth", "--class", "sea", "--digit", 1, *CPU)


def test_names_of_classes_before_numbers_and_abbreviated(conditional):
    """Named "29", "28", ..., "0"."""
    state = torch.load(conditional[0], weights_only=True)
    state["network"]["num_labels"] = 30
    weight = state["averaged_weights"]["embed_y.weight"]
    state["averaged_weights"]["embed_y.weight"] = torch.randn(31, weight.shape[1])
    known = {"source": "mnist", "size": [28, 28], "palette": None}
    state["dataset"] = known | {"classes": [str(29 - i) for i in range(30)]}
    torch.save(state, "many.pth")
    d = respaced(load_checkpoint("many.pth"), 30)
    assert torch.equal(draw("many.pth", "--class 1 --n 1"), mode(d, 1, y=torch.tensor([28])))
    line = fail("sample.py", "many.pth", "--class", "x", *CPU)
    assert line.endswith(
        "28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, "
        "10, ...; 0 to 29; all; none"
    )


# --------------------------------------------------------------------------------------------------
# Both


@BOTH
def test_without_a_checkpoint_the_released_one_is_used(script, checkpoint, monkeypatch):
    """And the script says so."""
    module = MODULE[script]
    assert module.RELEASED == RELEASED and RELEASED.exists()
    assert not succeed(script, checkpoint, "--n", 2, *CPU).startswith("Using")
    monkeypatch.setattr(module, "RELEASED", checkpoint)
    out = succeed(script, "--n", 2, *CPU)
    assert out.splitlines()[0] == f"Using the released model, {checkpoint}"


@BOTH
def test_device(script, checkpoint, monkeypatch):
    asked, pick = [], cli.pick_device
    monkeypatch.setattr(cli, "pick_device", lambda name: asked.append(name) or pick("cpu"))
    for flags in ([], ["--device", "tpu"]):
        succeed(script, checkpoint, "--n", 1, *flags)
    assert asked == ["auto", "tpu"]


def test_a_script_from_elsewhere(checkpoint, tmp_path):
    """A real process, through a symbolic link, in another folder: the same pictures."""
    flags = checkpoint, "--n", 2, *CPU, "--out"
    succeed("sample.py", *flags, "here.png")
    Path("link.py").symlink_to(sample.__file__)
    process = start(tmp_path / "link.py", *flags, "there.png", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert Path("here.png").read_bytes() == Path("there.png").read_bytes()


@BOTH
def test_bad_checkpoint(script, checkpoint):
    """The message names the file."""
    state = torch.load(checkpoint, weights_only=True)
    state["network"]["channels"] = [16, 8, 8]
    torch.save(state, "misfit.pth")
    Path("cut.pth").write_bytes(checkpoint.read_bytes()[:3000])
    Path("folder").mkdir()
    for name in ("cut.pth", "misfit.pth", "nowhere.pth", "folder"):
        line = fail(script, name, *CPU)
        assert name in line and ("does not fit" in line) == (name == "misfit.pth")


@BOTH
@pytest.mark.parametrize("timesteps", [11, 0, -1])
def test_more_timesteps_than_in_training(script, timesteps, checkpoint):
    line = fail(script, checkpoint, "--timesteps", timesteps, *CPU)
    assert "1..10" in line and str(timesteps) in line


BAD = """--n 0, --n many, --n 100000000000000000000, --seed -1, --seed 4294967296, --out=,
    --timesteps many, --device nonsense, --out digits.jpg, --out digits, --out folder,
    --out file/x.SUFFIX, --out file/deeper/x.SUFFIX, nonsense"""


@BOTH
@pytest.mark.parametrize("flags", BAD.split(","))
def test_bad_input_to_both(script, flags, checkpoint):
    Path("file").touch()
    fail(script, checkpoint, *CPU, *flags.replace(".SUFFIX", SUFFIX[script]).split())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch-size 0", "at least 1"),
        ("--first -1", "at least 0"),
        ("--first 100000000000000000000", "at most"),
        ("--save-tensor folder", "not a regular file"),
        ("--save-tensor=", "is empty"),
        ("--digit 12", "invalid choice"),
        ("--digit x", "invalid choice"),
        ("--digit 3", "--digit: small.pth was trained without classes"),
        ("--digit none", "--digit: small.pth was trained without classes"),
        ("--guidance 1", "--guidance: small.pth was trained without classes"),
        ("--guidance 0", "--guidance: small.pth was trained without classes"),
        ("--digit 3 --guidance -1", "at least 0"),
        ("--digit none --guidance 1", "needs a class"),
    ],
)
def test_bad_input_to_sample(flags, words, checkpoint):
    Path("folder").mkdir()
    shutil.copy(checkpoint, "small.pth")
    assert words in fail("sample.py", "small.pth", *CPU, *flags.split())


@pytest.mark.parametrize("flags", ["--fps 0", "--fps nan", "--fps 51", "--n 257"])
def test_bad_input_to_visualize(flags, checkpoint):
    assert "must be" in fail("visualize_denoising.py", checkpoint, *flags.split())


@BOTH
def test_unwritable_folder(script, checkpoint):
    folder = Path("locked")
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    out = folder / f"digits{SUFFIX[script]}"
    assert "ermission denied" in fail(script, checkpoint, "--out", out, *CPU)


def test_bad_input_to_a_real_process(tmp_path):
    """`call` emulates this: exit code 1 and a single line on stderr."""
    process = start("sample.py", "nowhere.pth", *CPU, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("sample.py: error: ") and "nowhere.pth" in line
    assert not list(tmp_path.iterdir())
