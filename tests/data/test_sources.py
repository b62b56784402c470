"""Every source gives its images, labels and classes in a fixed order, and one clear error if it cannot."""

import errno
import gzip
import hashlib
import os
import pickle
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from advcl_hub.data import load_data, train_val_split
from advcl_hub.data.decoding import LazyImages, Square
from advcl_hub.data.sources import DEBIAN_FASHION_MNIST
from tests.support.image_files import RANDOM, all_images, encode, pixels, write

# ---- folders -------------------------------------------------------------------------------------


def test_folder_agrees_with_torchvision(pets: Path, storage: str) -> None:
    write(pets / "train" / "dog" / "grey.png", encode(pixels(channels=1)))
    write(pets / "train" / ".ipynb_checkpoints" / "x.txt", b"")
    write(pets / "train" / "dog" / ".DS_Store", b"")
    data = load_data("folder:pets", root=pets.parent)
    assert isinstance(data.images, LazyImages if storage == "lazy" else Tensor)
    assert (data.name, data.classes, data.shape) == ("folder:pets", ("cat", "dog"), (3, 8, 8))

    (pets / "train" / ".ipynb_checkpoints" / "x.txt").unlink()
    (pets / "train" / ".ipynb_checkpoints").rmdir()
    reference = torchvision.datasets.ImageFolder(str(pets / "train"))
    assert data.labels.tolist() == [label for _, label in reference]
    expected = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in reference])
    assert torch.equal(all_images(data), expected)
    assert data.indices.tolist() == list(range(9))


def test_folder_errors(pets: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'val', it has: train, test"):
        load_data(f"folder:{pets}", "val")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_data("folder:nowhere", root=pets)
    with pytest.raises(NotADirectoryError, match=r"1\.png is a file"):
        load_data("folder:train/cat/1.png", root=pets)
    (pets / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"train/ and test/ must have the same class folders.*: bird"):
        load_data(f"folder:{pets}")
    (pets / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"folder:pets \(train\) has no readable image of the class bird"):
        load_data(f"folder:{pets}")
    write(pets / "train" / "bird" / "notes.txt", b"")
    with pytest.raises(ValueError, match=r"notes\.txt is no image \(suffixes: \.jpg"):
        load_data(f"folder:{pets}")


def test_a_folder_without_splits_or_without_classes_says_what_is_expected(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "1.png", b"")
    with pytest.raises(ValueError) as error:
        load_data(f"folder:{tmp_path}", "test")
    expected = f"expected {tmp_path}/SPLIT/CLASS/IMAGE, with SPLIT one of train, val, test"
    assert str(error.value) == f"folder {tmp_path} has no split 'test': {expected}"
    write(tmp_path / "test" / "1.png", b"")
    with pytest.raises(ValueError) as error:
        load_data(f"folder:{tmp_path}", "test")
    assert str(error.value) == f"{tmp_path / 'test'} has no class folders, expected {tmp_path / 'test'}/CLASS/IMAGE"


def test_a_class_folder_that_cannot_be_read_is_no_empty_one(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def scandir(folder: str | os.PathLike[str]) -> Any:
        if Path(folder) == pets / "train" / "cat":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)  # permissions do not bind root
    with pytest.raises(PermissionError, match=r"Permission denied: .*train/cat"):
        load_data(f"folder:{pets}")


@pytest.fixture
def unreadable(pets: Path) -> Iterator[Path]:
    pets.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # permissions do not bind root
    yield pets
    if root:
        os.seteuid(0)
    pets.chmod(0o700)


def test_unreadable_root(unreadable: Path) -> None:
    with pytest.raises(PermissionError, match="cannot be read, check its permissions"):
        load_data(f"folder:{unreadable}")


# ---- torchvision's sets --------------------------------------------------------------------------


def register(kind: type, attribute: str, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishes the checksums of small files, which torchvision then reads as it reads the real ones."""
    sums = [[file.name, hashlib.md5(file.read_bytes()).hexdigest()] for file in files]
    monkeypatch.setattr(kind, attribute, sums)


def test_cifar10_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, folder = torchvision.datasets.CIFAR10, tmp_path / "cifar-10-batches-py"
    images = RANDOM.randint(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    batch = {"data": images.reshape(20, -1), "labels": [*range(10)] * 2}
    file = write(folder / "data_batch_1", pickle.dumps(batch))
    names = write(folder / "batches.meta", pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}))
    register(kind, "train_list", [file], monkeypatch)
    monkeypatch.setattr(kind, "test_list", [])
    checksum = hashlib.md5(names.read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": names.name, "key": "label_names", "md5": checksum})
    data = load_data("cifar10", root=tmp_path)
    assert (data.name, data.classes[9]) == ("cifar10", "class 9")
    assert torch.equal(all_images(data), torch.from_numpy(images))
    assert data.labels.tolist() == [*range(10)] * 2


def test_cifar_file_with_another_checksum_is_never_unpickled(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    for file, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list:
        write(tmp_path / "cifar-10-batches-py" / file, pickle.dumps(Attack()))
    write(tmp_path / "cifar-10-batches-py" / "batches.meta", pickle.dumps(Attack()))
    with pytest.raises(FileNotFoundError, match=r"cifar10 is absent .*fail their checksums"):
        load_data("cifar10", root=tmp_path)
    assert not (tmp_path / "unpickled").exists()


def test_stl10_has_an_unlabeled_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, folder = torchvision.datasets.STL10, tmp_path / "stl10_binary"
    images = RANDOM.randint(0, 256, (10, 3, 96, 96), dtype=np.uint8)
    stored = images.transpose(0, 1, 3, 2).tobytes()  # the binary files are column-major
    train = write(folder / "train_X.bin", stored)
    labels = write(folder / "train_y.bin", bytes(range(1, 11)))
    names = write(folder / "class_names.txt", "\n".join(f"class {k}" for k in range(10)).encode())
    extra = write(folder / "unlabeled_X.bin", stored)
    register(kind, "train_list", [train, labels, extra], monkeypatch)
    monkeypatch.setattr(kind, "test_list", [])
    data = load_data("stl10", root=tmp_path)
    assert names.exists() and data.classes[4] == "class 4"
    assert torch.equal(all_images(data), torch.from_numpy(images))
    assert data.labels.tolist() == [*range(10)]
    unlabeled = load_data("stl10", "unlabeled", root=tmp_path, size=32)
    assert (unlabeled.labels.tolist(), unlabeled.shape) == ([-1] * 10, (3, 32, 32))
    assert len(train_val_split(unlabeled, 0.3)[1]) == 3


def test_torchvision_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cifar10 needs root"):
        load_data("cifar10")
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python/.*or download=True"):
        load_data("cifar100", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_data("stl10", root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "kind", "error", "reason"),
    [
        ("cifar10", "CIFAR10", URLError("no route to host"), "no route to host"),
        ("cifar100", "CIFAR100", RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        ("cifar10", "CIFAR10", ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset by peer"),
        ("cifar10", "CIFAR10", IncompleteRead(b"x"), "IncompleteRead(1 bytes read)"),
        ("fashion-mnist", "FashionMNIST", URLError("no route to host"), "no route to host"),
        ("fashion-mnist", "FashionMNIST", RuntimeError("File not found or corrupted."), "File not found or corrupted."),
    ],
)
def test_a_download_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, kind: str, error: Exception, reason: str
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", fail)
    monkeypatch.setattr("advcl_hub.data.sources.DEBIAN_FASHION_MNIST", tmp_path / "none")
    root = tmp_path / "new"  # need not exist, as torchvision makes it
    with pytest.raises(ConnectionError) as caught:
        load_data(source, root=root, download=True)
    assert str(caught.value) == f"{source} could not be downloaded to {root}: {reason}"


@pytest.mark.parametrize("source", ["cifar10", "stl10", "fashion-mnist"])
def test_a_file_in_the_place_of_the_root_is_no_failed_download(tmp_path: Path, source: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="file"):
        load_data(source, root=tmp_path / "file", download=True)


# ---- IDX files -----------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path: Path, suffix: str, folder: str) -> None:
    images, labels = RANDOM.randint(0, 256, (10, 28, 28), dtype=np.uint8), np.arange(10, dtype=np.uint8)
    pack = gzip.compress if suffix else bytes
    write(tmp_path / folder / f"t10k-images-idx3-ubyte{suffix}", pack(idx(images)))
    write(tmp_path / folder / f"t10k-labels-idx1-ubyte{suffix}", pack(idx(labels)))
    data = load_data("fashion-mnist", "test", root=tmp_path, channels=1)
    assert torch.equal(all_images(data), torch.from_numpy(images)[:, None])
    assert data.labels.tolist() == [*range(10)]
    assert data.classes[9] == "Ankle boot"


def test_fashion_mnist_is_downloaded_only_if_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def download(self: torchvision.datasets.FashionMNIST) -> None:
        asked.append(raw := Path(self.raw_folder))
        for prefix in ("train", "t10k"):
            write(raw / f"{prefix}-images-idx3-ubyte", idx(np.zeros((10, 28, 28), np.uint8)))
            write(raw / f"{prefix}-labels-idx1-ubyte", idx(np.arange(10, dtype=np.uint8)))

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    monkeypatch.setattr("advcl_hub.data.sources.DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte or .*, or root and download=True"):
        load_data("fashion-mnist", root=tmp_path)
    for split in ("train", "test"):
        assert load_data("fashion-mnist", split, root=tmp_path, download=True).labels.tolist() == [*range(10)]
    assert asked == [tmp_path / "FashionMNIST" / "raw"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((10, 28, 28), np.uint8))[:-1], "the file is truncated"),
        (idx(np.zeros((10, 28, 28), np.uint8))[:6], "the file is truncated"),
        (idx(np.zeros(10, np.uint8)), "begins with 00000801, expected the IDX magic 00000803"),
        (idx(np.zeros((9, 28, 28), np.uint8)), "9 images but .* 10 labels"),
    ],
    ids=["cut", "header cut", "magic", "count"],
)
def test_wrong_idx_files(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "train-images-idx3-ubyte", content)
    with pytest.raises(FileNotFoundError, match="no train-labels"):
        load_data("fashion-mnist", root=tmp_path)
    write(tmp_path / "train-labels-idx1-ubyte", idx(np.arange(10, dtype=np.uint8)))
    with pytest.raises(ValueError, match=message):
        load_data("fashion-mnist", root=tmp_path)


def test_truncated_gzip(tmp_path: Path) -> None:
    write(tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(idx(pixels(28, 28)))[:-20])
    write(tmp_path / "train-labels-idx1-ubyte.gz", b"plain")
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz is truncated or no gzip file"):
        load_data("fashion-mnist", root=tmp_path)


def test_debian_fashion_mnist() -> None:
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    data = load_data("fashion-mnist", "test", channels=1)
    assert (data.shape, data.labels.bincount().tolist()) == ((1, 28, 28), [1000] * 10)
    assert data.labels[:5].tolist() == [9, 2, 1, 1, 6]


# ---- sources that are always there ---------------------------------------------------------------


def test_digits_split_is_fixed_balanced_and_complete() -> None:
    train, test = load_data("digits", size=8, channels=1), load_data("digits", "test", size=8, channels=1)
    assert (len(train), len(test), load_data("digits", "test").shape) == (1438, 359, (3, 32, 32))
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert (share - 0.2).abs().max() < 0.003
    # Results on digits are compared over years and machines: this test set must never change.
    assert test.fingerprint() == "81657a420226934507534b1e05f3ac81d4a807ea7d4ec98c8db003dbeca6d7bf"
    from sklearn.datasets import load_digits

    together = torch.cat([all_images(train), all_images(test)]).flatten(1).double() * (16 / 255)
    assert together.round().sum() == load_digits().data.sum()


def test_fake_images_can_be_learnt_and_splits_differ() -> None:
    train, test = load_data("fake"), load_data("fake:200", "test")
    assert (len(train), len(test), test.name) == (1000, 200, "fake:200")
    pixels_of = {data: all_images(data).double().flatten(1) for data in (train, test)}
    means = torch.stack([pixels_of[train][train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(pixels_of[test], means).argmin(1)
    assert (nearest == test.labels).double().mean() > 0.95
    assert torch.cdist(pixels_of[test], pixels_of[train]).min() > 0
    assert load_data("fake").fingerprint() == train.fingerprint()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar-10", "unknown data source 'cifar-10'; did you mean 'cifar10'?"),
        ("Folder:x", "did you mean 'folder:PATH'?"),
        ("folder", "did you mean 'folder:PATH'?"),
        ("folder:", "did you mean 'folder:PATH'?"),
        ("digits:5", "did you mean 'digits'?"),
        ("zzz", "unknown data source 'zzz'. Known sources: digits, cifar10"),
        ("fake:9", "at least one for each of 10 classes"),
        ("fake:x", "expected fake:N"),
    ],
)
def test_unknown_source_names_the_nearest(source: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_data(source)
    assert message in str(error.value)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"digits has no split 'val', it has: train, test"):
        load_data("digits", "val")
    with pytest.raises(ValueError, match="channels is 4"):
        load_data("fake", channels=4)
    with pytest.raises(ValueError, match="size is 0"):
        load_data("fake", size=0)
    with pytest.raises(ValueError, match="size and fit were given: both decide the size of the images, leave one out"):
        load_data("fake", size=8, fit=Square(8))
