"""Pseudo-labels: the clusters, the cache, the file and the refusal of labels of other images."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from advcl_hub.data import ImageData, load_data, train_val_split
from advcl_hub.pretraining import pseudo_labels
from advcl_hub.pretraining.pseudo_labels import load_pseudo_labels, make_pseudo_labels
from tests.support import ROOT
from tests.support.small_encoders import blobs, pixels, save_encoder
from train.cluster_report import cluster_stats, purity

SHARED = Path(os.environ.get("ADVCL_TEST_DATA", ROOT.parent / "shared" / "data"))
PUBLISHED = SHARED / "cifar10" / "pseudo_labels_imagenet_simclr.safetensors"
PUBLISHED_PURITY = {2: 0.20, 10: 0.55, 50: 0.67, 100: 0.70, 500: 0.75}
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED.name} is not at hand")


def permuted(data: ImageData, count: int, seed: int = 1) -> tuple[ImageData, Tensor]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return data.subset(order), order


@pytest.fixture
def label_file(tmp_path: Path) -> tuple[Path, ImageData]:
    data = blobs()
    made = make_pseudo_labels(data, "pixels", (2, 3), cache_dir=tmp_path)
    return tmp_path / made.provenance["file"], data


def rewrite(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


# Clusters


def test_separated_images_are_told_apart() -> None:
    data = blobs()
    made = make_pseudo_labels(data, "pixels", (3, 2))
    assert made.ks == (3, 2)
    assert made.labels.dtype == torch.int64 and made.labels.shape == (60, 2)
    assert purity(made.labels[:, 0], data.labels) == 1
    assert purity(made.labels[:, 1], data.labels) == pytest.approx(2 / 3)


def test_features_are_compared_by_direction() -> None:
    """Red and green at very different brightness: without L2 normalisation, K = 2 would not split by colour."""
    data = blobs()
    colour, brightness = torch.arange(60) % 2, torch.tensor([20, 250]).repeat_interleave(30)
    images = torch.randint(0, 3, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images[torch.arange(60), colour] += brightness[:, None, None]
    labels = make_pseudo_labels(replace(data, images=images.byte()), "pixels", (2,)).labels[:, 0]
    assert purity(labels, colour) == 1


def test_held_out_images_get_the_nearest_centre(tmp_path: Path) -> None:
    data, test = blobs(), blobs(per_class=5, seed=9)
    made = make_pseudo_labels(data, "pixels", (3,), held_out={"test": test}, cache_dir=tmp_path)
    path = tmp_path / made.provenance["file"]
    held_out = load_pseudo_labels(path, test, "test")
    of_class = {int(c): int(k) for c, k in zip(data.labels, made.labels[:, 0], strict=True)}
    assert held_out.labels[:, 0].tolist() == [of_class[int(c)] for c in test.labels]


@pytest.mark.slow
def test_labels_are_the_same_in_another_process_with_other_threads() -> None:
    program = """if True:
        import json, torch
        from advcl_hub.data import load_data
        from train.pseudo_labels import make_pseudo_labels
        data = load_data("digits", "test")
        torch.rand(7)  # the global generator plays no part
        print(json.dumps(make_pseudo_labels(data, "pixels", (2, 10), seed=3).labels.tolist()))
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "5"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    data = load_data("digits", "test")
    here = make_pseudo_labels(data, "pixels", (2, 10), seed=3).labels
    assert json.loads(run.stdout) == here.tolist()
    assert not torch.equal(here, make_pseudo_labels(data, "pixels", (2, 10), seed=4).labels)


# Requests that cannot work


@pytest.mark.parametrize(
    ("ks", "message"),
    [
        ((), "distinct"),
        ((2, 2), "distinct"),
        ((1, 5), "at least 2"),
        ((2, 61), "K = 61 clusters.*blobs has 60"),
    ],
)
def test_unusable_ks_are_refused(ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pseudo_labels(blobs(), "pixels", ks)


def test_unusable_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be from 0"):
        make_pseudo_labels(blobs(), "pixels", (2,), seed=-1)


def test_a_class_without_images_is_refused_but_unlabelled_data_is_not() -> None:
    data = blobs()
    with pytest.raises(ValueError, match=r"no images of 1 of 3 classes \(green\)"):
        make_pseudo_labels(data.subset((data.labels != 1).nonzero()[:, 0]), "pixels", (2,))
    unlabelled = replace(data, labels=torch.full_like(data.labels, -1))
    assert purity(make_pseudo_labels(unlabelled, "pixels", (3,)).labels[:, 0], data.labels) == 1


def test_copies_of_an_image_are_not_enough_for_k_clusters() -> None:
    data = blobs()
    copies = replace(data, images=pixels(data)[:3].repeat(20, 1, 1, 1))
    with pytest.raises(ValueError, match="as many distinct images, blobs has 3"):
        make_pseudo_labels(copies, "pixels", (2, 4))


# The cache


def test_second_run_takes_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs()
    first = make_pseudo_labels(data, "pixels", (2, 3), cache_dir=tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("clustered again")

    monkeypatch.setattr(pseudo_labels, "_cluster", fail)
    again = make_pseudo_labels(data, "pixels", (3, 2), cache_dir=tmp_path)
    assert torch.equal(again.labels, first.labels.flip(1))
    assert again.provenance == first.provenance
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]  # and nothing temporary


def test_every_part_of_the_key_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs()
    cache = tmp_path / "cache"
    encoders = [
        f"local-dir:{save_encoder(tmp_path / 'a' / 'same-name', seed=0)}",
        f"local-dir:{save_encoder(tmp_path / 'b' / 'same-name', seed=1)}",
        f"local-dir:{save_encoder(tmp_path / 'c' / 'other-name', seed=0)}",
    ]
    brighter = pixels(data).clone()
    brighter[0, 0, 0, 0] += 1

    def files_after(data: ImageData, encoder: str, ks: tuple[int, ...] = (2, 3), seed: int = 0) -> int:
        make_pseudo_labels(data, encoder, ks, seed, cache_dir=cache)
        return len(list(cache.iterdir()))

    assert files_after(data, encoders[0]) == 1
    assert files_after(data, encoders[0]) == 1
    assert files_after(data, encoders[1]) == 2  # other weights under the same name
    assert files_after(data, encoders[2]) == 3  # the same weights under another name
    assert files_after(replace(data, images=brighter), encoders[0]) == 4
    assert files_after(data, encoders[0], ks=(2, 4)) == 5
    assert files_after(data, encoders[0], seed=1) == 6
    monkeypatch.setattr(pseudo_labels, "METHOD", "other")
    assert files_after(data, encoders[0]) == 7


def test_file_has_the_published_layout_and_tells_where_it_comes_from(
    label_file: tuple[Path, ImageData],
) -> None:
    path, data = label_file
    tensors = load_file(path)
    assert {key: tensor.dtype for key, tensor in tensors.items()} == {
        "train_2": torch.int16,
        "train_3": torch.int16,
        "train_digest": torch.int64,
    }
    provenance = load_pseudo_labels(path, data).provenance
    assert provenance["train_fingerprint"] == data.fingerprint()
    assert (provenance["encoder"], provenance["k"], provenance["seed"]) == ("pixels", "2 3", "0")
    assert f"torch {torch.__version__}" in provenance["versions"]


# Alignment


def test_labels_follow_subsets_and_permutations(label_file: tuple[Path, ImageData]) -> None:
    path, data = label_file
    whole = load_pseudo_labels(path, data).labels
    part, order = permuted(data, 25)
    assert torch.equal(load_pseudo_labels(path, part).labels, whole[order])
    for half in train_val_split(data, 0.5):
        assert torch.equal(load_pseudo_labels(path, half, ks=(3,)).labels, whole[half.indices][:, 1:])


def test_labels_made_of_a_subset_are_stored_at_the_positions_of_its_source(tmp_path: Path) -> None:
    data = blobs()
    part, order = permuted(data, 40)
    made = make_pseudo_labels(part, "pixels", (3,), cache_dir=tmp_path)
    assert purity(made.labels[:, 0], part.labels) == 1
    path = tmp_path / made.provenance["file"]
    assert load_file(path)["train_3"][order].tolist() == made.labels[:, 0].tolist()
    with pytest.raises(ValueError, match=r"20 of the 60 labels of train_3 lie outside"):
        load_pseudo_labels(path, data)


# Files that cannot be used


def test_missing_and_corrupt_files(tmp_path: Path, label_file: tuple[Path, ImageData]) -> None:
    path, data = label_file
    with pytest.raises(FileNotFoundError, match=r"make_pseudo_labels"):
        load_pseudo_labels(tmp_path / "absent.safetensors", data)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_pseudo_labels(path, data)


def test_what_the_file_lacks_is_named(label_file: tuple[Path, ImageData]) -> None:
    path, data = label_file
    with pytest.raises(ValueError, match=r"no labels for K = \[10\], only for \[2, 3\]"):
        load_pseudo_labels(path, data, ks=(2, 10))
    with pytest.raises(ValueError, match="no labels of the split 'test', only train_2"):
        load_pseudo_labels(path, data, "test")


def test_labels_that_do_not_fit_the_data_are_refused(label_file: tuple[Path, ImageData]) -> None:
    path, data = label_file
    labels = load_file(path)["train_3"]
    rewrite(path, train_3=labels[:59])
    with pytest.raises(ValueError, match=r"image at position 59 of its source"):
        load_pseudo_labels(path, data)
    for wrong in (3, -1):
        changed = labels.clone()
        changed[7] = wrong
        rewrite(path, train_3=changed)
        with pytest.raises(ValueError, match=r"1 of the 60 labels of train_3 lie outside \[0, 3\)"):
            load_pseudo_labels(path, data)
    rewrite(path, train_3=labels.float())
    with pytest.raises(ValueError, match="float32"):
        load_pseudo_labels(path, data)


def test_labels_of_other_images_are_refused(label_file: tuple[Path, ImageData]) -> None:
    path, data = label_file
    with pytest.raises(ValueError, match="other images: 60 of 60"):
        load_pseudo_labels(path, blobs(seed=5))
    shifted = replace(data, images=pixels(data).roll(1, 0))
    with pytest.raises(ValueError, match="other images: 60 of 60"):
        load_pseudo_labels(path, shifted)
    part, _ = permuted(data, 25)
    with pytest.raises(ValueError, match="other images"):
        load_pseudo_labels(path, replace(part, indices=part.indices.roll(1)))


def test_a_file_without_digests_must_be_of_as_many_images(label_file: tuple[Path, ImageData]) -> None:
    path, data = label_file
    rewrite(path, train_digest=None)
    whole = replace(data, source_length=60)
    part, order = permuted(whole, 25)
    assert torch.equal(load_pseudo_labels(path, part).labels, load_pseudo_labels(path, whole).labels[order])
    with pytest.raises(ValueError, match="of 60 images and blobs has 50"):
        load_pseudo_labels(path, replace(part.subset(torch.arange(5)), source_length=50, indices=torch.arange(5)))


# The published labels


@needs_published
def test_published_purity() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (file,) = sorted(PUBLISHED.parent.glob("train-*.parquet"))
    classes = torch.tensor(parquet.read_table(file, columns=["label"])["label"].to_pylist())
    # Labels need no pixels: empty images keep this to a second.
    images = torch.zeros(len(classes), 3, 1, 1, dtype=torch.uint8)
    data = ImageData(images, classes, torch.arange(len(classes)), tuple("0123456789"), "cifar10")
    published = load_pseudo_labels(PUBLISHED, data)
    assert published.ks == tuple(PUBLISHED_PURITY)
    for one in cluster_stats(published.labels, published.ks, classes):
        assert one.purity == pytest.approx(PUBLISHED_PURITY[one.k], abs=0.005)
        assert int(one.sizes.sum()) == 50_000
    part, order = permuted(data, 1000)
    assert torch.equal(load_pseudo_labels(PUBLISHED, part, ks=(50,)).labels[:, 0], published.labels[order, 2])
    assert load_pseudo_labels(PUBLISHED, data.subset(torch.arange(10_000)), "test").labels.shape == (
        10_000,
        5,
    )
    assert published.provenance["file"] == PUBLISHED.name and len(published.provenance["file_sha256"]) == 64
