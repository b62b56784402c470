"""Images in memory and lazy ones behave alike; damaged images are found before work starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from advcl_hub.data import ImageData, batches, decoding, load_data, train_val_split
from advcl_hub.data.decoding import LazyImages
from tests.support.image_files import all_images, encode, pixels, write

# ---- decoding ------------------------------------------------------------------------------------


def test_size_is_torchvisions_resize_and_centre_crop(pets: Path, storage: str) -> None:
    wide = write(pets / "train" / "cat" / "0.png", encode(pixels(30, 50)))
    data = load_data(f"folder:{pets}", size=20)
    reference = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(20, torchvision.transforms.InterpolationMode.BICUBIC),
            torchvision.transforms.CenterCrop(20),
            torchvision.transforms.PILToTensor(),
        ]
    )
    assert data.shape == (3, 20, 20)
    assert torch.equal(all_images(data)[0], reference(Image.open(wide)))


def test_channels_convert_between_grey_and_rgb(pets: Path) -> None:
    grey = pixels(channels=1)
    write(pets / "train" / "cat" / "0.png", encode(grey))
    as_rgb = load_data(f"folder:{pets}").images[0]
    assert torch.equal(as_rgb, torch.from_numpy(grey).expand(3, 8, 8))
    as_grey = load_data(f"folder:{pets}", channels=1)
    assert as_grey.shape == (1, 8, 8)
    rgb = load_data(f"folder:{pets}").images[1].double()
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert (as_grey.images[1].double() - luma).abs().max() <= 1


@pytest.mark.parametrize(
    "damaged",
    [
        encode(pixels(64, 64))[:-2000],  # a PNG cut short: its header is fine
        encode(pixels(64, 64), "JPEG")[:-500],
        (whole := encode(pixels(64, 64), "JPEG"))[:20] + bytes(130) + whole[150:],  # its end marker is there
        encode(pixels(64, 64), "BMP")[:-500],
        b"not an image",
        b"",
        encode(pixels(8, 8, channels=1).astype(np.uint16) * 100),  # 16 bits: PIL would clip it to white
    ],
    ids=["png", "jpeg", "jpeg inside", "bmp", "text", "empty", "16 bit"],
)
def test_damaged_images_are_named_and_skipped(pets: Path, storage: str, damaged: bytes) -> None:
    write(pets / "train" / "cat" / "2.png", damaged)
    write(pets / "train" / "dog" / "0.png", damaged)
    with pytest.warns(UserWarning, match=r"2 of 9 images cannot be read: train/cat/2\.png.*train/dog/0\.png") as caught:
        data = load_data(f"folder:{pets}", size=8)
    assert len(caught) == 1
    assert data.indices.tolist() == [0, 2, 3, 5, 6, 7, 8]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    kept = np.array(Image.open(pets / "train" / "cat" / "3.png"))
    assert torch.equal(all_images(data)[1], torch.from_numpy(kept).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"2 of 9 .*cat/2\.png"):
        load_data(f"folder:{pets}", size=8, strict=True)


def test_a_git_lfs_pointer_in_place_of_an_image_says_what_to_run(pets: Path, storage: str) -> None:
    write(pets / "train" / "cat" / "2.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:5b3c\nsize 1234\n")
    said = r"1 of 8 .*: train/cat/2\.png \(a Git LFS pointer and not the image: run git lfs pull\)\. Replace"
    with pytest.raises(ValueError, match=said):
        load_data(f"folder:{pets}", strict=True)


def test_whole_jpeg_with_trailing_bytes_is_kept(pets: Path, storage: str) -> None:
    write(pets / "train" / "cat" / "9.jpg", encode(pixels(), "JPEG") + b"camera notes")
    assert len(load_data(f"folder:{pets}", strict=True)) == 9


def test_lazy_image_damaged_after_loading_is_named(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 0)
    data = load_data(f"folder:{pets}")
    write(pets / "train" / "cat" / "2.png", b"")
    with pytest.raises(ValueError, match=r"train/cat/2\.png"):
        all_images(data)


def test_mixed_sizes_ask_for_size(pets: Path, storage: str) -> None:
    write(pets / "train" / "dog" / "2.png", encode(pixels(8, 9)))
    with pytest.raises(ValueError, match=r"train/dog/2\.png is 8x9 .* first image is 8x8; pass size="):
        load_data(f"folder:{pets}")


def test_all_images_damaged(pets: Path) -> None:
    for path in pets.glob("train/*/*.png"):
        path.write_bytes(b"junk")
    for size in (None, 8):
        with pytest.raises(ValueError, match=r"images can(not)? be read.*train/cat/1\.png"):
            load_data(f"folder:{pets}", size=size)


# ---- splits, batches, fingerprints ---------------------------------------------------------------


def test_train_val_split_is_disjoint_balanced_and_fixed() -> None:
    data = load_data("fake:200")
    train, val = train_val_split(data, 0.15, seed=3)
    assert sorted(train.indices.tolist() + val.indices.tolist()) == list(range(200))
    assert val.labels.bincount().tolist() == [3] * 10
    assert torch.equal(val.labels, data.labels[val.indices])
    assert torch.equal(all_images(val), all_images(data)[val.indices])
    assert torch.equal(train_val_split(data, 0.15, seed=3)[1].indices, val.indices)
    assert not torch.equal(train_val_split(data, 0.15, seed=4)[1].indices, val.indices)
    # The same on all machines and with all versions of NumPy.
    assert val.indices[:5].tolist() == [10, 20, 23, 27, 28]


def test_train_val_split_errors() -> None:
    data = load_data("fake:20")
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="fraction is"):
            train_val_split(data, fraction)
    with pytest.raises(ValueError, match="label 9 has a single image"):
        train_val_split(data.subset(torch.arange(19)))


def test_subset_of_a_subset_keeps_source_positions() -> None:
    data = load_data("fake:20")
    part = data.subset(torch.tensor([7, 3, 5])).subset(torch.tensor([2, 0]))
    assert part.indices.tolist() == [5, 7]
    assert torch.equal(all_images(part), all_images(data)[[5, 7]])


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_batches_equal_those_in_memory(pets: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    memory = load_data(f"folder:{pets}")
    monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 0)
    lazy = load_data(f"folder:{pets}")
    assert isinstance(memory.images, Tensor) and isinstance(lazy.images, LazyImages)
    order = torch.tensor([6, 0, 3, 3, 7, 1, 2])
    reference = list(batches(memory, 2, order=order))
    streamed = list(batches(lazy, 2, order=order, workers=workers))
    for (images, rows), (expected, expected_rows) in zip(streamed, reference, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, expected) and torch.equal(rows, expected_rows)
        assert torch.equal(images, memory.images[rows])
    assert [row for _, rows in streamed for row in rows.tolist()] == order.tolist()


def test_a_sample_is_seeded_and_of_all_classes() -> None:
    data = load_data("digits", "test")
    by_class = data.subset(data.labels.argsort())
    sample = by_class.sample(100, seed=1)
    assert len(sample) == 100 == len(sample.indices.unique()) and len(sample.labels.unique()) == 10
    assert torch.equal(sample.indices, by_class.sample(100, seed=1).indices)
    assert not torch.equal(sample.indices, by_class.sample(100, seed=2).indices)
    assert sorted(data.sample(10**6).indices.tolist()) == data.indices.tolist()


def test_batches_resume_with_the_rest_of_the_order(pets: Path, storage: str) -> None:
    data, order = load_data(f"folder:{pets}"), torch.randperm(8)
    whole = list(batches(data, 3, order=order))
    rest = list(batches(data, 3, order=order[2 * 3 :]))
    assert len(rest) == 1 and torch.equal(rest[0][0], whole[2][0]) and torch.equal(rest[0][1], whole[2][1])
    assert list(batches(data, 3, order=order[:0])) == []


def test_batches_leave_the_global_generator_alone(pets: Path, storage: str) -> None:
    data = load_data(f"folder:{pets}")
    before = torch.get_rng_state()
    all_images(data)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_check_their_arguments_at_the_call() -> None:
    data = load_data("fake:20")
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(data, 0)
    for order in (torch.tensor([0, 20]), torch.tensor([-1]), torch.ones(20, dtype=torch.bool)):
        with pytest.raises(ValueError, match="positions"):
            batches(data, 2, order=order)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_cuda(pets: Path, storage: str) -> None:
    data, order = load_data(f"folder:{pets}"), torch.randperm(8)
    on_device = data.to("cuda")
    assert on_device.fingerprint() == data.fingerprint()
    expected = list(batches(data, 3, order=order))
    for (images, rows), (reference, positions) in zip(batches(on_device, 3, device="cuda", order=order), expected, strict=True):
        assert images.is_cuda and rows.is_cuda
        assert torch.equal(images.cpu(), reference) and torch.equal(rows.cpu(), positions)
        assert torch.equal(on_device.labels[rows].cpu(), data.labels[positions])


def test_fingerprint_sees_images_labels_and_indices(pets: Path, storage: str) -> None:
    data = load_data(f"folder:{pets}")
    original = data.fingerprint()
    prints = {original}
    prints.add(load_data(f"folder:{pets}", size=9).fingerprint())
    prints.add(ImageData(data.images, 1 - data.labels, data.indices, data.classes, data.name).fingerprint())
    prints.add(ImageData(data.images, data.labels, data.indices + 1, data.classes, data.name).fingerprint())
    prints.add(data.subset(torch.arange(7)).fingerprint())
    moved = pets.rename(pets.parent / "elsewhere")
    assert load_data(f"folder:{moved}").fingerprint() == original
    write(moved / "train" / "dog" / "2.png", encode(np.zeros((8, 8, 3), np.uint8)))
    prints.add(load_data(f"folder:{moved}").fingerprint())
    assert len(prints) == 6


def test_image_data_refuses_what_does_not_fit() -> None:
    labels, images = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 images, 1 labels and 2 indices"):
        ImageData(images, labels[:1], labels, ("a",), "x")
    with pytest.raises(ValueError, match=r"torch\.float32"):
        ImageData(images / 255, labels, labels, ("a",), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((2, 3, 4, 4), np.uint8)},
            "images are ndarray, expected a torch.Tensor: torch.from_numpy(images)",
        ),
        ({"labels": [0, 0]}, "labels are list, expected a torch.Tensor"),
        (
            {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)},
            "images are (2, 4, 4, 3), expected (N, C, H, W): images.permute(0, 3, 1, 2)",
        ),
        (
            {"labels": torch.zeros(2)},
            "labels are torch.float32 (2,), expected torch.int64 (N,): labels.long(), if they are class numbers",
        ),
        (
            {"labels": torch.zeros(2, 5, dtype=torch.int64)},
            "labels are torch.int64 (2, 5), expected torch.int64 (N,): of one-hot labels take labels.argmax(1)",
        ),
        ({"indices": torch.zeros(2, 1, dtype=torch.int64)}, "indices are torch.int64 (2, 1), expected torch.int64 (N,)"),
    ],
)
def test_arrays_of_other_kinds_and_shapes_are_refused_with_what_to_write(changes: dict[str, Any], message: str) -> None:
    data = ImageData(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), torch.arange(2), ("a",), "x")
    with pytest.raises(ValueError) as error:
        replace(data, **changes)
    assert str(error.value) == message
