"""A folder of one's own pictures: formats, sizes, colours, splits, and errors."""

import os
import re
import shutil
from pathlib import Path

from cli import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import folder
from dataset import Dataset, load_dataset, padded, take, unpadded

pytestmark = pytest.mark.usefixtures("fresh_directory")


def save(name, picture, **options):
    """Save an array or picture as pictures/`name`; the extension is the format."""
    path = Path("pictures", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(path, **options)
    return path


def random_grey(seed, h=6, w=10):
    return np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)


def make_pictures(n=30, name="{}.png", h=6, w=10):
    for i in range(n):
        save(name.format(i), random_grey(i, h, w))


def load(**options) -> dict[str, Dataset]:
    return {split: load_dataset(split, "pictures", **options) for split in folder.SPLITS}


def contents(parts) -> list[bytes]:
    """Each picture without padding, split by split."""
    return [x.numpy().tobytes() for p in parts.values() for x in unpadded(p.images, p.size)]


def opened(name, picture, **options) -> np.ndarray:
    """The grey values of a picture, read from its file."""
    return np.asarray(folder.open_picture(save(name, picture, **options), False).convert("L"))


def refusal(**options) -> str:
    with pytest.raises(UserError) as error:
        load_dataset("train", "pictures", **options)
    line = str(error.value)
    assert line and "\n" not in line
    return line


# --------------------------------------------------------------------------------------------------
# What comes out


def test_a_flat_folder():
    """Padded grey bytes, sorted by name, without classes; the splits hold each picture once."""
    make_pictures()
    parts = load()
    assert [len(part.images) for part in parts.values()] == [27, 1, 2]
    for part in parts.values():
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (1, 8, 16)
        assert part.labels.dtype == torch.int64 and not part.labels.any()
        known = (part.source, part.classes, part.size, part.palette)
        assert known == (str(Path("pictures").resolve()), (), (6, 10), None)
        assert torch.equal(padded(unpadded(part.images, part.size)[:, 0]), part.images)
    names = sorted(f"{i}.png" for i in range(30))
    files, seen = [random_grey(int(name[:-4])).tobytes() for name in names], contents(parts)
    assert sorted(seen) == sorted(files)
    assert seen[:27] == [content for content in files if content in set(seen[:27])]


def test_sub_folders_are_classes():
    """Sorted names, at any depth; links are followed; other files are ignored."""
    for i, name in enumerate(["b", "a/deep/er", "C d"]):
        for j in range(12):
            save(f"{name}/{j}.png", random_grey(j) // 4 + 64 * i)
    shutil.move("pictures/C d", "elsewhere")
    Path("pictures/C d").symlink_to(Path("elsewhere").resolve())
    Path("pictures/b/up").symlink_to("..")  # would never end
    for name in (".hidden.png", "a/Thumbs.db", "b/desktop.ini", "notes.txt", "b/notes.pdf"):
        Path("pictures", name).write_text("no picture")
    for name in ("__MACOSX", ".git"):
        save(f"{name}/x.png", random_grey(0, 3, 3))
    Path("pictures/empty").mkdir()
    parts = load().values()
    assert {part.classes for part in parts} == {("C d", "a", "b")}
    assert torch.cat([part.labels for part in parts]).bincount().tolist() == [12, 12, 12]
    for part in parts:
        level = part.images.amax((1, 2, 3)) // 64
        assert torch.equal(level.long(), torch.tensor([2, 1, 0])[part.labels])


def test_endings():
    """Any format that Pillow reads; also in upper case."""
    for i, ending in enumerate(["PNG", "bmp", "gif", "tiff", "WebP", "pgm", "jpg", "JPEG"]):
        save(f"{i}.{ending}", random_grey(i), **({"lossless": True} if ending == "WebP" else {}))
    seen = contents(load())
    assert len(seen) == 8 and {random_grey(i).tobytes() for i in range(6)} <= set(seen)


def test_colour_becomes_grey():
    colours = np.zeros((1, 4, 3), np.uint8)
    colours[0] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]
    assert opened("x.png", colours).tolist() == [[76, 150, 29, 9]]


def test_a_rotated_photograph():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    grey = random_grey(0)
    assert np.array_equal(opened("x.png", grey, exif=exif), np.rot90(grey, -1))
    photograph = opened("x.jpg", np.full((6, 10), 200, np.uint8), exif=exif)
    assert photograph.shape == (10, 6)


def test_transparency_is_over_black():
    rgba = np.full((1, 3, 4), 200, np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    assert opened("a.png", rgba).tolist() == [[0, 100, 200]]
    assert opened("b.png", rgba[:, :, 2:]).tolist() == [[0, 100, 200]]  # LA
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([50, 50, 50, 100, 100, 100, 150, 150, 150])
    assert opened("c.png", picture, transparency=1).tolist() == [[50, 0, 150]]


def test_16_bits():
    values = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    for ending in ("png", "tiff"):
        assert opened(f"x.{ending}", values).tolist() == [[0, 0, 1, 127, 255]]
    bilevel = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert opened("x.png", bilevel).tolist() == [[0, 255]]


def test_size():
    """Resized with antialiasing to any height and width; the split does not depend on it."""
    board = np.kron(np.indices((20, 20)).sum(0) % 2, np.ones((2, 2))).astype(np.uint8) * 255
    for i in range(20):
        save(f"{i}.png", np.roll(board, i, 1) // (i + 1))
    save("other.png", random_grey(0, 30, 50))
    before = {split: len(part.images) for split, part in load(size=40).items()}
    for size, sides, shape in ((10, (10, 10), (16, 16)), ((4, 24), (4, 24), (8, 24))):
        parts = load(size=size)
        assert {split: len(part.images) for split, part in parts.items()} == before
        for part in parts.values():
            assert part.size == sides and part.images.shape[2:] == shape
    grey = unpadded(load(size=10)["train"].images[:1], (10, 10)).float()
    assert 110 < grey.mean() < 145 and grey.std() < 40  # antialiased


def test_cost_is_announced(capsys):
    """Large pictures get a note on time."""
    make_pictures()
    load()
    assert capsys.readouterr().err == "Reading 30 pictures, 6x10\n"  # once for all splits
    load(size=(256, 128))
    err = capsys.readouterr().err
    assert "256x128" in err and "takes 32 times as long as with 32x32" in err


@pytest.mark.parametrize("h, w", [(28, 28), (32, 32), (1, 9), (7, 130), (25, 31)])
def test_padding(h, w):
    images = torch.randint(1, 256, (3, h, w), dtype=torch.uint8)
    x = padded(images)
    assert x.shape[2] % 8 == x.shape[3] % 8 == 0
    assert x.shape[2] - h < 8 and x.shape[3] - w < 8
    assert torch.equal(unpadded(x, (h, w))[:, 0], images)
    assert x.long().sum() == images.long().sum()
    top, bottom = x.amax((0, 1, 3)).nonzero()[[0, -1], 0].tolist()
    assert x.shape[2] - 1 - bottom - top in (0, 1)  # centred


def test_what_is_kept_and_described():
    make_pictures(name="c/{}.png")
    data = load_dataset("train", "pictures")
    for part in (take(data, 5), data.to(torch.device("meta"))):
        assert part.description == data.description
    source = str(Path("pictures").resolve())
    expected = {"source": source, "classes": ["c"], "size": [6, 10], "palette": None}
    assert data.description == expected
    torch.save(data.description, "x.pth")
    assert torch.load("x.pth", weights_only=True) == expected


# --------------------------------------------------------------------------------------------------
# Splits


def test_splits_move_no_picture():
    """90, 5 and 5 %; unaffected by names and other pictures; copies stay together."""
    for i in range(600):
        save(f"{i:03}.png", random_grey(i, 2, 3))

    def sets():
        return [set(contents({0: part})) for part in load().values()]

    before = sets()
    for part, share in zip(before, (0.9, 0.05, 0.05), strict=True):
        assert abs(len(part) / 600 - share) < 0.03
    for i in range(0, 600, 7):
        Path(f"pictures/{i:03}.png").rename(f"pictures/x{i}.png")
    for i in range(600, 700):
        save(f"{i}.bmp", random_grey(i, 2, 3))
        save(f"copy{i}.png", random_grey(i - 300, 2, 3))
    after = sets()
    assert all(map(set.issubset, before, after))
    assert sum(map(len, after)) == len(set.union(*after)) == 700


def test_few_pictures():
    """Each split has at least one."""
    for n in (3, 4, 8, 60):
        make_pictures(n)
        sizes = [len(part.images) for part in load().values()]
        assert sum(sizes) == n and min(sizes) >= 1
    for shares in ([0.91, 0.92, 0.96], [0.96, 0.97, 0.98], [0.1, 0.2, 0.3]):
        assert folder.split_by(np.array(shares)).tolist() == [0, 1, 2]


# --------------------------------------------------------------------------------------------------
# Palettes

FIVE = [(200, 0, 0), (0, 0, 0), (0, 90, 0), (9, 9, 255), (250, 250, 250)]
ORDERED = tuple(sorted(FIVE))


def levels(i, n=5):
    return np.random.default_rng(i).integers(0, n, (40, 24), dtype=np.uint8)


def indexed(indices, palette=FIVE):
    picture = Image.fromarray(indices, "P")
    picture.putpalette([channel for colour in palette for channel in colour])
    return picture


@pytest.mark.parametrize("kind", ["rgb", "palette", "two palettes"])
def test_colours_are_states(kind):
    """Sorted by RGB; the last picture has them all; unused palette entries are ignored."""
    table, wanted = np.array(FIVE, np.uint8), []
    for i in range(30):
        x = levels(i, 3 if i < 29 else 5)
        wanted.append(table[x].tobytes())
        if kind == "two palettes" and i % 2:
            save(f"{i:02}.png", indexed(4 - x, FIVE[::-1]))
        else:
            save(f"{i:02}.png", table[x] if kind == "rgb" else indexed(x, [*FIVE, (1, 2, 3)]))
    parts, seen = load(palette=True), []
    for part in parts.values():
        assert part.palette == ORDERED and part.size == (40, 24)
        assert part.description["palette"] == [list(colour) for colour in ORDERED]
        x = unpadded(part.images, part.size)[:, 0]
        seen += torch.tensor(ORDERED, dtype=torch.uint8)[x.int()]
    assert sorted(x.numpy().tobytes() for x in seen) == sorted(wanted)


def test_grey_label_maps():
    for i in range(30):
        save(f"{i}.png", levels(i, 3) * 7)
    parts = load(palette=True)
    assert parts["train"].palette == ((0, 0, 0), (7, 7, 7), (14, 14, 14))
    assert set(contents(parts)) == {levels(i, 3).tobytes() for i in range(30)}


def test_palettes_are_resized_without_new_colours():
    for i in range(30):
        save(f"{i}.png", indexed(levels(i)))
    train = load(palette=True, size=(16, 20))["train"]
    assert train.palette == ORDERED and train.images.shape[2:] == (16, 24)


def test_256_colours():
    for i in range(3):
        save(f"{i}.png", np.roll(np.arange(256, dtype=np.uint8).reshape(16, 16), i))
    assert len(load(palette=True)["train"].palette) == 256
    save("3.png", np.full((16, 16, 3), (1, 2, 3), np.uint8))
    assert "more than 256 colours: use --levels" in refusal(palette=True)


# --------------------------------------------------------------------------------------------------
# What is refused


def test_no_folder():
    pattern = "'pictures' is neither a folder nor one of auto, mnist"
    assert re.search(pattern, refusal())
    Path("pictures").write_text("a file")
    assert re.search(pattern, refusal())


def test_no_pictures():
    Path("pictures/deep").mkdir(parents=True)
    assert "no pictures that Pillow can read" in refusal()
    Path("pictures/deep/x.txt").touch()
    assert "no pictures that Pillow can read" in refusal()


def test_pictures_that_do_not_go_together():
    make_pictures(3, "class/{}.png")
    save("x.png", random_grey(0))
    assert refusal().endswith("which are the classes, and outside of them (x.png)")
    shutil.rmtree("pictures/class")
    make_pictures(5)
    save("x.png", random_grey(0, 7, 10))
    assert refusal().endswith("x.png has 7x10 pixels, others 6x10: give a --size")
    shutil.rmtree("pictures")
    for i in range(9):
        save(f"{i}.png", random_grey(i % 2))
    assert "only 2 different pictures, too few for three splits" in refusal()


def broken(path):
    path.write_bytes(b"no picture")


def cut(path):
    save(path.name, random_grey(0, 200, 200))
    path.write_bytes(path.read_bytes()[:-5000])


def wide_grey(path):
    Image.fromarray(np.full((6, 10), 70_000, np.int32)).save(path, format="tiff")


def floating(path):
    Image.fromarray(np.full((6, 10), 0.5, np.float32)).save(path, format="tiff")


REFUSED = [
    (broken, "cannot identify image file"),
    (cut, "truncated"),
    (wide_grey, "too many levels of grey: save it with 8 bits"),
    (floating, "too many levels of grey: save it with 8 bits"),
]


@pytest.mark.parametrize("make, reason", REFUSED)
def test_a_picture_that_cannot_be_read(make, reason):
    make_pictures(5)
    make(Path("pictures/x.png"))
    assert re.search(rf"/pictures/x\.png can't be read: .*{re.escape(reason)}", refusal())


def test_a_link_that_leads_nowhere():
    make_pictures(3)
    Path("pictures/x.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"pictures/x\.png"):
        load_dataset("train", "pictures")


@pytest.mark.parametrize("ending", ["png", "gif", "tiff", "webp"])
def test_animated_formats(ending):
    """Multiple pages, too; a still picture in such a format is fine."""
    make_pictures(3, "{}." + ending)
    load()
    frames = [Image.fromarray(random_grey(i)) for i in range(3)]
    save(f"x.{ending}", frames[0], save_all=True, append_images=frames[1:])
    assert refusal().endswith(f"x.{ending} can't be read: it is animated or has several pages")


def test_a_camera_preview_is_no_animation():
    frames = [Image.fromarray(random_grey(i)) for i in range(2)]
    save("x.mpo", frames[0], save_all=True, append_images=frames[1:])
    path = Path("pictures/x.mpo").rename("pictures/x.jpg")
    with Image.open(path) as picture:
        assert picture.is_animated
    assert folder.open_picture(path, False).size == (10, 6)


def test_palettes_that_are_refused():
    for i in range(3):
        save(f"{i}.png", np.full((6, 10), 5, np.uint8))
    assert "only 1 colour: use --levels" in refusal(palette=True)
    save("0.png", np.full((6, 10), 300, np.uint16))
    assert "too many levels of grey: save it with 8 bits" in refusal(palette=True)


def test_impossible_options():
    make_pictures(3)
    for size in (0, -3, (0, 5), (1, 2, 3), (4,)):
        assert "the size must be" in refusal(size=size)
    for data in ("auto", "mnist", "offline", "fashion"):
        for options in ({"size": 28}, {"palette": True}):
            with pytest.raises(UserError, match=f"are for a folder of pictures, not for {data}"):
                load_dataset("train", data, **options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_sub_folder_that_cannot_be_read():
    make_pictures(3, "a/{}.png")
    os.chmod("pictures/a", 0)
    with pytest.raises(PermissionError):
        load_dataset("train", "pictures")


def test_changed_pictures_are_read_again():
    make_pictures(3)
    before = contents(load())
    path = save("0.png", 255 - random_grey(0))
    os.utime(path, (1, 1))
    assert sorted(contents(load())) != sorted(before)
