"""A folder of one's own pictures, from train.py through all scripts; and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import own
import pytest
import torch
from PIL import Image
from scripts import call, checkpoint_of, fail, resumed, spy, succeed

import train
from checkpoint import load_checkpoint, read_checkpoint
from dataset import load_dataset
from pictures import image_grid
from trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_directory")
SMALL = "--channels 8 8 8 --timesteps 10 --batch-size 16 --device cpu --out-dir out"
SMALL = SMALL.split()
FLAGS = "--data own --levels palette --conditional --epochs 1"
FLAGS = [*SMALL, *FLAGS.split()]
PALETTE = sorted(own.COLOURS)
COLOURS = {tuple(colour) for colour in PALETTE} | {(96, 96, 96)}
SIZE = (40, 20)  # padded to 40x24
LAST = "out/checkpoints/last.pth"


def grey_pictures(*names: str, size=(9, 13), seed: int = 0) -> None:
    """Write grey pictures of this height and width, all different."""
    generator = np.random.default_rng(seed)
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(name, quality=95)


def colours_of(path: str) -> set[tuple]:
    with Image.open(path) as picture:
        return {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}


@pytest.fixture
def folder(monkeypatch) -> Path:
    """A folder of 60 pictures, five colours and two classes."""
    monkeypatch.setattr(own, "SIZE", SIZE)
    return own.own_folder()


@pytest.fixture
def demo(folder, monkeypatch) -> Path:
    """That folder, and in `out` a short run on it."""
    monkeypatch.setattr(train, "save_figure", lambda figure, file: None)  # it takes long
    succeed("train.py", *FLAGS)
    return folder


def test_a_run_on_own_pictures(folder, monkeypatch):
    """Levels are the palette's, unchanged; the network knows their number, the classes and the
    shape; samples have the palette's colours and no padding; a checkpoint says all of that."""
    validated, validate = [], Trainer.validate
    monkeypatch.setattr(Trainer, "validate", lambda *a: validated.append(a[1]) or validate(*a))
    served = spy(monkeypatch, train, "batches")
    out = succeed("train.py", *FLAGS).splitlines()
    splits = "train", "validation"
    data, held_out = (load_dataset(split, folder, palette=True) for split in splits)
    n = len(data.images)
    assert out[0] == f"{n} pictures of {folder} for training, {len(held_out.images)} for validation"
    assert "peak learning rate 0.002" in out[2] and out[-1].startswith("Done. Draw pictures: ")
    assert torch.equal(validated[0], held_out.images)
    (given, *settings), _ = served[-1]
    assert torch.equal(given.images, data.images) and settings[-3:] == [5, "palette", 0]
    known = {"source": str(folder), "classes": ["hill", "lake"], "size": list(SIZE)}
    for name in ("last", "weights"):
        state = checkpoint_of("out", name)
        assert state["dataset"] == known | {"palette": PALETTE}
        assert state["binarize"] == "palette" and state["network"]["num_labels"] == 2
        assert state["diffusion"]["image_shape"] == (1, 40, 24)
        assert state["diffusion"]["num_levels"] == 5 and not state["network"]["ordinal"]
    samples = load_checkpoint(LAST).sample(64, y=torch.arange(64) % 2, last_step="mode")
    sheet = image_grid(samples, 5, 8, PALETTE, SIZE)
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        assert picture.size == (2 * (8 * 22 + 2), 2 * (8 * 42 + 2))
        assert np.array_equal(picture, sheet)


def test_all_scripts_know_the_pictures_from_the_checkpoint(demo):
    """Samples of a class by name and by number, a completion, an animation, an evaluation."""
    options = ["--n", "2", "--save-tensor", "a.pt", "--out", "a.png"]
    drawn = []
    for label in ("lake", 1):
        succeed("sample.py", LAST, "--class", label, *options)
        drawn.append(torch.load("a.pt"))
    assert drawn[0].shape == (2, 1, *SIZE) and torch.equal(*drawn)
    assert colours_of("a.png") <= COLOURS
    with Image.open(demo / "hill" / "0.png") as picture:
        part = np.array(picture.convert("RGBA"))
        states = np.array([PALETTE.index(colour) for colour in own.COLOURS])[np.array(picture)]
    part[:, 10:, 3] = 0
    Image.fromarray(part).save("part.png")
    succeed("sample.py", LAST, "--fill", "part.png", *options)
    kept = torch.load("a.pt")[:, 0, :, :10].numpy()
    assert (kept == states[:, :10]).all() and colours_of("a.png") <= COLOURS
    succeed("visualize_denoising.py", LAST, "--n", 1, "--out", "a.gif")
    with Image.open("a.gif") as animation:
        assert animation.n_frames > 5
    out = succeed("evaluate.py", LAST, "--device", "cpu")
    report = json.loads(Path("out/evaluation.json").read_text())
    for name in ("bound", "bound_with_labels"):
        bound = report[name]
        bits = bound["nats_per_image"] / (40 * 20 * np.log(2))
        assert bound["bits_per_dimension"] == pytest.approx(bits)
    assert "Samples are not judged" in out and Path("out/nearest.png").exists()


def test_a_run_goes_on_with_its_pictures_only(demo):
    """The same flags again are no contradiction. Another folder, colour or class is."""
    resumed("--data own --levels palette --steps 4")
    assert checkpoint_of("out")["step"] == 4
    more = "train.py", "--resume", "--epochs", 3, "--out-dir", "out"
    assert "--levels 5 disagrees with the run to resume: palette" in fail(*more, "--levels", 5)
    demo.rename("moved")
    assert "neither a folder" in fail(*more)
    line = fail(*more, "--data", "moved")
    assert line.endswith(f"differ in source from those that the run was trained on ({demo})")
    Path("moved").rename(demo)
    Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(demo / "hill" / "new.png")
    assert f"({demo}) differ in palette" in fail(*more)
    (demo / "hill" / "new.png").unlink()
    (demo / "hill").rename(demo / "mountain")
    assert f"({demo}) differ in classes" in fail(*more)
    (demo / "mountain").rename(demo / "hill")
    for file in list(demo.glob("*/*")):
        shutil.copy(file, file.with_name(f"again_{file.name}"))
    assert f"{demo} has other pictures than when the run began" in fail(*more)


def test_other_pictures_may_start_from_its_weights(demo):
    """Of another shape, too; not with more classes or levels."""
    grey_pictures(*(f"two/{c}/{i}.png" for c in "ab" for i in range(20)), size=(16, 8))
    flags = [*SMALL, "--conditional", "--init", LAST, "--out-dir", "new"]
    line = fail("train.py", "--data", "two", "--levels", 4, *flags)
    assert "another network, by its num_levels, num_states, ordinal" in line
    for i in range(40):
        own.palette_image(np.arange(128).reshape(16, 8) * (i + 1) % 5).save(f"two/a/{i % 20}.png")
        grey_pictures(f"three/{'abc'[i % 3]}/{i}.png", seed=i)
    line = fail("train.py", "--data", "three", *flags)
    assert "by its num_levels, num_states, num_labels" in line


def test_grey_pictures_of_odd_sides(monkeypatch):
    """JPEGs of several sizes in one flat folder, stretched; a resumed run reads them alike."""
    names = [f"photos/{i}.JPG" for i in range(30)]
    grey_pictures(*names)
    grey_pictures(*names[:9], size=(31, 7))
    flags = [*SMALL, "--data", "photos", "--levels", 4, "--epochs", 1]
    line = fail("train.py", *flags)
    assert "9x13 pixels, others 31x7: give a --size" in line
    loaded = spy(monkeypatch, train, "load_dataset")
    code, _, err = call("train.py", *flags, "--size", 11, 6)
    assert code == 0 and "30 pictures, 11x6" in err
    state = read_checkpoint(LAST)
    assert state["dataset"]["size"] == [11, 6] and state["dataset"]["classes"] == []
    assert state["diffusion"]["image_shape"] == (1, 16, 8) and state["network"]["ordinal"]
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        assert picture.size == (2 * (8 * 8 + 2), 2 * (8 * 13 + 2))
    resumed("--size 11 6 --epochs 2")
    assert all(args[3:] == ([11, 6], False) for args, _ in loaded)
    line = fail("train.py", "--resume", "--size", 11, "--epochs", 3, "--out-dir", "out")
    assert "--size [11, 11] disagrees with the run to resume: [11, 6]" in line


@pytest.mark.parametrize(
    "names, flags, words",
    [
        (["x/a/1.png", "x/a/2.png", "x/a/3.png"], "--conditional", "two sub-folders"),
        (["x/1.png", "x/2.png", "x/3.png"], "--conditional", "has 0"),
        (["x/1.png", "x/2.png", "x/3.png"], "", "batch size must be between 1 and"),
        (["x/1.png", "x/2.png", "x/3.png"], "--size 5 5 5", "one side or height and width"),
        (["x/1.png", "x/2.png", "x/3.png"], "--batch-size 1 --channels 7 7 7", "multiples of 8"),
        (["x/1.png", "x/2.png"], "", "too few for three splits"),
        (["y/1.png"], "", "neither a folder"),
        (["x/a.txt"], "", "no pictures"),
    ],
)
def test_refusals(names, flags, words):
    """One line each, and nothing is written."""
    grey_pictures(*(name for name in names if name.endswith(".png")))
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert words in fail("train.py", *SMALL, "--data", "x", *flags.split())


def test_a_picture_that_cannot_be_read():
    grey_pictures(*(f"x/{i}.png" for i in range(20)))
    Path("x/3.png").write_bytes(b"no picture")
    assert "3.png can't be read" in fail("train.py", *SMALL, "--data", "x")
