"""Which images, at which size, with which labels and in which batches a model is evaluated; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData, load_data
from advcl_hub.data.corruptions import CORRUPTIONS
from advcl_hub.evaluation import Protocol, evaluate
from tests.support.image_files import encode, pixels, write
from tests.support.tiny_classifiers import TinyNet, labelled_by


class Enlarged(TinyNet):
    """Wants 16x16 images, normalised; pools them back to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (3, 16, 16),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        }
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape[1:]))
        return self.layers(nn.functional.avg_pool2d(images, 2))


def test_small_images_are_attacked_at_their_own_size_and_enlarged_inside() -> None:
    model = Enlarged()
    data = labelled_by(TinyNet(), 10)
    found = evaluate(model, data, Protocol(eps=0.1, check_images=5))
    assert set(model.seen) == {(3, 16, 16)}, "the model sees its own size"
    assert found.record["model"]["attacked_at"] == [3, 8, 8] and found.record["model"]["fitted_inside"] == "enlarged"
    assert next(c for c in found.record["checks"] if c["name"] == "perturbations within eps")["passed"]


def test_a_part_of_imagenet_is_judged_among_all_of_its_classes(tmp_path: Path) -> None:
    for name in ("n01443537", "n03000684"):  # the model's classes 1 and 491
        for number in range(2):
            write(tmp_path / "test" / name / f"{number}.png", encode(pixels(24, 24)))
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 24, 24)}).eval()
    with torch.no_grad():
        model.get_classifier().bias[491] = 100  # type: ignore[operator, union-attr, index]
    found = evaluate(model, f"folder:{tmp_path}", Protocol(steps=0))
    assert found.images["label"] == [1, 1, 491, 491] and found.images["prediction"] == [491] * 4
    assert found.standard == 0.5 and list(found.record["per_class"]) == ["n01443537", "n03000684"]


@pytest.mark.parametrize("sizes", [[(20, 20)], [(9, 30), (24, 20)], [(8, 8)]])
def test_large_or_uneven_images_are_brought_to_the_models_size(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    for number, (height, width) in enumerate(sizes * 2):
        for name in ("cat", "dog"):
            write(tmp_path / "test" / name / f"{number}.png", encode(pixels(height, width)))
    model = Enlarged()
    model.num_classes, model.layers[3] = 2, nn.Linear(72, 2)
    found = evaluate(model, f"folder:{tmp_path}", Protocol(check_images=0)).record["model"]
    expected = ([3, 8, 8], "enlarged") if sizes == [(8, 8)] else ([3, 16, 16], None)
    assert (found["attacked_at"], found["fitted_inside"]) == expected and set(model.seen) == {(3, 16, 16)}


def test_labels_follow_the_names_that_the_model_gives_its_classes() -> None:
    model = TinyNet(3)
    data = labelled_by(model, 20)
    model.pretrained_cfg = {"label_names": ["class2", "class0", "class1"]}  # type: ignore[assignment]
    order = torch.tensor([1, 2, 0])  # class0 is the model's 1 ...
    named = replace(data, labels=order.argsort()[data.labels])
    assert evaluate(model, named, Protocol(steps=0)).standard == 1.0
    assert evaluate(model, data, Protocol(steps=0)).standard < 1.0
    model.pretrained_cfg = {"label_names": ["a", "b", "c"]}  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"The model's classes are a, b, c \.\.\., those of random class0"):
        assert evaluate(model, data, Protocol(steps=0)).standard == 1.0


def test_models_and_data_that_do_not_fit_are_refused() -> None:
    data = labelled_by(TinyNet(), 10)
    with pytest.raises(
        ValueError, match=r"tells 5 classes apart, random has 10 \(class0, class1, class2 \.\.\.\): train a new head"
    ):
        evaluate(TinyNet(5), data)
    grey = replace(data, images=torch.zeros(10, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="takes 3 channels, the images of random have 1"):
        evaluate(Enlarged(), grey)
    with pytest.raises(ValueError, match="images without a label"):
        evaluate(TinyNet(), replace(data, labels=data.labels - 10))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """Two images of 20x30 pixels that are decoded when they are needed."""
    for name in ("cat", "dog"):
        write(tmp_path / "photos" / "test" / name / "0.png", encode(pixels(20, 30)))
    monkeypatch.setattr("advcl_hub.data.decoding.IN_MEMORY_BYTES", 0)
    return load_data(f"folder:{tmp_path / 'photos'}", "test")


def test_streamed_images_that_are_too_large_have_to_come_by_name(large: ImageData) -> None:
    model = Enlarged()
    model.num_classes = 2
    with pytest.raises(ValueError) as error:
        evaluate(model, large)
    assert str(error.value) == (
        "The images of folder:photos are 20x30, and have to be scaled to the model's 16x16 before they are attacked: give the "
        "data by name (folder:PATH), and that is done."
    )


def test_streamed_images_are_not_corrupted(large: ImageData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1800, 2))
    with pytest.raises(ValueError, match=r"^Corruptions need images in memory, folder:photos is too large for that\.$"):
        evaluate(model, large, Protocol(steps=0), corruptions="generated")


def test_a_batch_that_does_not_fit_the_memory_is_halved() -> None:
    model = TinyNet()
    data = labelled_by(model, 40)
    limit = 12

    def full(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full)
    found = evaluate(model, data, Protocol(steps=1, batch_size=100))
    assert found.record["batch_size"] == 10 and found.record["protocol"]["batch_size"] == 100
    limit = 0
    with pytest.raises(ValueError, match="Not even one image"):
        evaluate(model, data, Protocol(steps=1))


def test_the_balanced_subset_is_fixed_and_balanced() -> None:
    data = labelled_by(TinyNet(3, seed=1), 60)
    data = replace(data, labels=torch.tensor([0] * 40 + [1] * 15 + [2] * 5))
    positions = data.balanced_positions(12)
    assert positions.tolist() == data.balanced_positions(12).tolist() == sorted(positions.tolist())
    assert data.labels[positions].bincount().tolist() == [4, 4, 4]
    assert data.labels[data.balanced_positions(14)].bincount().tolist() == [5, 5, 4]
    assert data.labels[data.balanced_positions(30)].bincount().tolist() == [13, 12, 5], "a class that is short is filled up"
    assert set(positions.tolist()) <= set(data.balanced_positions(30).tolist()), "a larger subset holds the smaller ones"
    assert data.balanced_positions(60).tolist() == list(range(60))
    first = evaluate(TinyNet(3), data, Protocol(steps=0), n=7, first=True)
    assert first.images["index"] == list(range(1000, 1007)) and first.record["data"]["selection"] == "the first"


def test_corruptions_keep_the_selection_and_average_over_all(tmp_path: Path) -> None:
    model = TinyNet()
    data = labelled_by(model, 30)
    record = evaluate(model, data, Protocol(steps=0), n=20, corruptions="generated").record
    found = record["corruptions"]
    assert set(found["by_severity"]) == set(CORRUPTIONS) and all(len(row) == 5 for row in found["by_severity"].values())
    assert found["mean"] == pytest.approx(sum(map(sum, found["by_severity"].values())) / 40)
    assert "not CIFAR-10-C" in record["corrupted"]["set"]

    # The published layout, with a corruption that does nothing and one that swaps all images for others.
    plain = replace(data, indices=torch.arange(30))
    assert isinstance(plain.images, Tensor)
    stored = plain.images.permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "labels.npy", np.tile(plain.labels.numpy(), 5))
    np.save(tmp_path / "none.npy", np.concatenate([stored] * 5))
    np.save(tmp_path / "other.npy", np.concatenate([stored[::-1]] * 5))
    table = evaluate(model, plain, Protocol(steps=0), n=20, corruptions=tmp_path).record["corruptions"]["by_severity"]
    swapped = (plain.labels == plain.labels.flip(0))[plain.balanced_positions(20)].double().mean().item()
    assert table == {"none": [1.0] * 5, "other": [pytest.approx(swapped)] * 5}
    other = replace(plain, labels=plain.labels.flip(0))
    with pytest.raises(ValueError, match="does not hold corrupted copies of the images of random"):
        evaluate(model, other, Protocol(steps=0), corruptions=tmp_path)


def test_what_cannot_be_measured_is_refused_before_work_starts(tmp_path: Path) -> None:
    data = labelled_by(TinyNet(), 10)
    assert isinstance(data.images, Tensor)
    for model, protocol, message in (
        (TinyNet(2), Protocol(loss="dlr"), "DLR loss needs at least 3 classes"),
        (TinyNet().half(), Protocol(), r"weights are float16; evaluation computes in float32: pass model\.float\(\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), Protocol(norm="L2"), None),
        (
            nn.Flatten(),
            Protocol(),
            r"gives 192 logits and does not name its classes, random has 10 \(class0",
        ),
        (nn.Conv2d(3, 10, 3), Protocol(), r"expected float logits \(10, classes\)"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
            Protocol(),
            r"^The model gives 5 logits, random has labels up to \d\.$",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(48, 10)),
            Protocol(),
            r"^The model fails on images \(10, 3, 8, 8\) of random: .*shape",
        ),
    ):
        few = replace(data, labels=data.labels.clamp(max=1), classes=("a", "b")) if message and "DLR" in message else data
        if message is None:
            assert evaluate(model, few, protocol).standard >= 0  # any function of images to logits will do
            continue
        with pytest.raises(ValueError, match=message):
            evaluate(model, few, protocol, output=tmp_path / "e")
        assert not (tmp_path / "e").exists()
    for n, first in ((0, False), (-3, True), (11, True), (11, False)):
        with pytest.raises(ValueError, match=f"{n} images were asked for, random has 10"):
            evaluate(TinyNet(), data, n=n, first=first)
    with pytest.raises(ValueError, match="without saying how many"):
        evaluate(TinyNet(), data, first=True)
    with pytest.raises(ValueError, match="No images"):
        evaluate(TinyNet(), data.subset(torch.arange(0)))
    with pytest.raises(ValueError, match=r"^data is a Tensor, expected a name such as folder:PATH, or ImageData\.$"):
        evaluate(TinyNet(), data.images)  # type: ignore[arg-type]
    large = replace(data, images=torch.zeros(10, 3, 40, 40, dtype=torch.uint8))
    assert evaluate(Enlarged(), large, Protocol(steps=0)).record["model"]["attacked_at"] == [3, 16, 16]  # as from a folder


class StuckNorm(nn.BatchNorm1d):
    """Stays in training mode."""

    def train(self, mode: bool = True) -> "StuckNorm":
        return super().train(True)


class Ends(TinyNet):
    """Does something with its logits."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.end(super().forward(images))


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), norm)


ALONE = "^The model cannot take one image alone"
NEEDS = r"\. To be evaluated it needs batch norms with running statistics, in evaluation mode \(Expected more than 1 value"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_norm(nn.BatchNorm1d(10, track_running_stats=False)), rf"{ALONE}: model\.2 normalise over the batch{NEEDS}"),
        (with_norm(StuckNorm(10)), rf"{ALONE}{NEEDS}"),
        (
            Ends(lambda x: x.squeeze()),
            r"\(10,\) for one image alone, expected float logits \(1, classes\)",
        ),
        (Ends(lambda x: x.squeeze().log_softmax(1)), rf"{ALONE} \(Dimension out of range"),
        (Ends(lambda x: x / x.std(0)), "gives outputs that are not finite for one image alone: there is nothing"),
    ],
    ids=["no statistics", "training mode", "squeezed", "squeezed too early", "standardised"],
)
@pytest.mark.filterwarnings("ignore:std")
def test_a_model_that_needs_several_images_at_once_is_refused(model: nn.Module, message: str) -> None:
    """Of a batch, one image alone may be left to attack."""
    with pytest.raises(ValueError, match=message):
        evaluate(model, labelled_by(TinyNet(), 10), Protocol(steps=1, check_images=0))


def test_where_no_image_comes_alone_it_may_need_several() -> None:
    model, data = Ends(lambda x: x.squeeze()), labelled_by(TinyNet(), 10)
    assert evaluate(model, data, Protocol(steps=0, check_images=0, batch_size=5)).standard == 1
    with pytest.raises(ValueError, match="for one image alone"):
        evaluate(model, data, Protocol(steps=0, check_images=0, batch_size=9))


def test_published_sets_are_averaged_over_their_fifteen_corruptions(tmp_path: Path) -> None:
    model = TinyNet()
    data = replace(labelled_by(model, 10), indices=torch.arange(10))
    assert isinstance(data.images, Tensor)
    stored = np.concatenate([data.images.permute(0, 2, 3, 1).numpy()] * 5)
    np.save(tmp_path / "labels.npy", np.tile(data.labels.numpy(), 5))
    for name in ("fog", "snow", "spatter"):
        np.save(tmp_path / f"{name}.npy", stored if name == "spatter" else 255 - stored)
    record = evaluate(model, data, Protocol(steps=0), corruptions=tmp_path).record
    table = record["corruptions"]["by_severity"]
    assert table["spatter"] == [1.0] * 5 and record["corrupted"]["averaged"] == ["fog", "snow"]
    assert record["corruptions"]["mean"] == pytest.approx((table["fog"][0] + table["snow"][0]) / 2)
