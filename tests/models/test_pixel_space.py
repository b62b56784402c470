"""Models as people hold them: wrapped, averaged, compiled, traced, in half precision, grey, in somebody's modes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import advcl_hub
from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import Protocol, evaluate, robustness
from advcl_hub.hub.export import export_folder
from advcl_hub.models.pixel_space import PixelSpace, unwrapped
from advcl_hub.opening import load_model
from tests.support.image_files import encode, pixels, write
from tests.support.small_encoders import blobs, export_encoder
from tests.support.tiny_classifiers import TinyNet, labelled_by

QUICK = Protocol(steps=2, check_images=0)


class Normalising(nn.Module):
    """Does what the cfg says, and forgets the cfg."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, images: Tensor) -> Tensor:
        return self.inner((images - 0.5) / 0.05)


class Delegating(Normalising):
    """Passes on what the model knows, as many wrappers do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.fixture
def model() -> nn.Module:
    net = TinyNet()
    net.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.05,) * 3, "crop_pct": 1.0}  # type: ignore[assignment]
    return net


@pytest.fixture
def data(model: nn.Module) -> ImageData:
    """Images that the model gets right when they are normalised, and mostly wrong when they are not."""
    return labelled_by(Normalising(model), 60)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        ModelEmaV2,
        ModelEmaV3,
        torch.compile,
        PixelSpace,
        lambda model: nn.DataParallel(AveragedModel(torch.compile(model))),
    ],
)
def test_known_wrappers_are_opened(model: nn.Module, data: ImageData, wrap: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected, found = (evaluate(m, data, QUICK, progress=False) for m in (model, wrap(model)))
    assert found.images == expected.images and expected.standard == 1.0
    assert {k: v for k, v in found.record["model"].items() if k != "name"} == {
        k: v for k, v in expected.record["model"].items() if k != "name"
    }
    assert robustness(wrap(model), data, steps=2) == robustness(model, data, steps=2)


def test_a_distributed_model_is_opened(model: nn.Module, data: ImageData, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert unwrapped(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        torch.distributed.destroy_process_group()


def test_an_unknown_wrapper_is_taken_as_it_is_with_a_warning(model: nn.Module, data: ImageData) -> None:
    with pytest.warns(UserWarning, match=r"Normalising hides what the TinyNet in it says of its images \(mean"):
        found = evaluate(Normalising(model), data, QUICK, progress=False)
    assert found.standard == 1.0 and found.record["model"]["std"] == [1.0], "nothing is applied twice"
    assert any("pass the TinyNet alone" in warning for warning in found.warnings)
    with pytest.warns(UserWarning, match="Sequential hides what the TinyNet"):
        assert evaluate(nn.Sequential(model), data, QUICK, progress=False).standard < 1.0


def test_a_wrapper_that_passes_the_cfg_on_may_normalise_twice(model: nn.Module, data: ImageData) -> None:
    with pytest.warns(UserWarning, match=r"Delegating gets images normalised with mean .*itself, pass its TinyNet alone"):
        evaluate(Delegating(model), data, QUICK, progress=False)


def test_a_wrapper_that_passes_on_that_nothing_is_normalised_is_taken_without_a_warning(model: nn.Module) -> None:
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        space = PixelSpace(Delegating(model))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(space(images), Normalising(model)(images))


def test_a_wrapper_may_hide_class_names_and_size_too() -> None:
    model = TinyNet()
    data = labelled_by(model, 20)
    names = data.classes[::-1]
    model.pretrained_cfg = {
        "input_size": (3, 8, 8),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "crop_pct": 1.0,
        "label_names": names,
    }  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"Sequential hides what the TinyNet in it says of its images .* and classes"):
        found = evaluate(nn.Sequential(model), data, QUICK, progress=False)
    assert found.standard != evaluate(model, data, QUICK, progress=False).standard


def test_a_wrapper_that_does_more_is_not_opened(model: nn.Module, data: ImageData) -> None:
    class Doing(nn.DataParallel[TinyNet]):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward((images - 0.5) / 0.05)

    with pytest.warns(UserWarning, match="Doing hides what the TinyNet"):
        assert evaluate(Doing(model), data, QUICK, progress=False).standard == 1.0
    hooked = nn.DataParallel(model)
    hooked.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 0.5) / 0.05,))
    with pytest.warns(UserWarning, match="DataParallel hides what the TinyNet"):
        assert evaluate(hooked, data, QUICK, progress=False).standard == 1.0


def test_models_without_a_plain_state_dict_are_measured_too(data: ImageData) -> None:
    class Extra(TinyNet):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model = Extra()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    assert evaluate(model, data, QUICK, progress=False).record["model"]["weights_sha256"]
    with pytest.raises(ValueError, match=r"weights without values .*: load them first"):
        evaluate(TinyNet().to("meta"), data)


def test_traced_models_have_forgotten_their_cfg(model: nn.Module, data: ImageData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = [torch.jit.trace(model, torch.rand(1, 3, 8, 8)), torch.fx.symbolic_trace(model)]
    for copy in traced:
        with pytest.warns(UserWarning, match="does not say which mean and std it expects"):
            evaluate(copy, data, QUICK, progress=False)


def test_accelerates_mixed_precision_is_told(model: nn.Module, data: ImageData) -> None:
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with pytest.warns(UserWarning, match="accelerate has made this TinyNet compute in mixed precision"):
        evaluate(prepared, data, QUICK, progress=False)


def test_a_wrapped_model_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DataParallel is no timm model .* of a wrapper, export the model in it"):
        export_folder(nn.DataParallel(timm.create_model("resnet8_cifar")), tmp_path / "wrapped", results={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused_with_the_remedy(data: ImageData, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for measure in (evaluate, robustness):
        with pytest.raises(ValueError, match=rf"weights are {name}; evaluation computes in float32: pass model\.float\(\)"):
            measure(TinyNet().to(dtype), data)  # type: ignore[operator]


def test_a_grey_model_is_measured_from_memory_as_from_a_folder(tmp_path: Path) -> None:
    """`timm.create_model(..., in_chans=1)` leaves three channels in the cfg; timm averages their mean and std."""
    torch.manual_seed(0)
    cfg = {"input_size": (3, 16, 16), "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    model = timm.create_model("test_resnet", in_chans=1, num_classes=2, pretrained_cfg_overlay=cfg).eval()
    for name in ("a", "b"):
        for i in range(4):
            write(tmp_path / "data" / "test" / name / f"{i}.png", encode(pixels(16, 16, channels=1)))
    timm.models.save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    found = [evaluate(m, f"folder:{tmp_path / 'data'}", QUICK, progress=False) for m in (model, tmp_path / "model")]
    assert found[0].images == found[1].images
    for key in ("input_size", "mean", "std"):
        assert found[0].record["model"][key] == pytest.approx(found[1].record["model"][key])
    assert found[0].record["model"]["input_size"] == [1, 16, 16]
    assert found[0].record["model"]["mean"] == pytest.approx([0.5])
    grey = load_data(f"folder:{tmp_path / 'data'}", "test", channels=1)
    assert evaluate(model, grey, QUICK, progress=False).images == found[0].images
    with pytest.raises(ValueError, match=r"takes 1 channels, the images of .* have 3: load_data\(channels=1\)"):
        evaluate(model, load_data(f"folder:{tmp_path / 'data'}", "test"))


# ---- the caller's own modes ------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "matmul precision": lambda: matmul_precision("medium"),
}


def modes() -> tuple[Any, ...]:
    """All that the caller has chosen."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_computes_the_same_in_anybodys_modes(model: nn.Module, data: ImageData, mode: str) -> None:
    expected = evaluate(model, data, QUICK, progress=False)
    with MODES[mode]():
        before = modes()
        found = evaluate(model, data, QUICK, progress=False)
        quick = robustness(model, data, steps=2)
        after = modes()
    assert found.images == expected.images and before == after
    assert (quick.standard, quick.robust) == (expected.standard, expected.robust)


def test_data_and_models_may_be_loaded_in_inference_mode(tmp_path: Path) -> None:
    folder = export_encoder(tmp_path / "model", num_classes=10)
    expected = evaluate(folder, "fake:20", QUICK, progress=False)
    with torch.inference_mode():
        data = load_data("fake:20", "test", size=16)
        loaded = load_model(folder).model
        mine = TinyNet()
        assert evaluate(folder, data, QUICK, progress=False).images["index"] == expected.images["index"]
    assert evaluate(loaded, data, QUICK, progress=False).standard >= 0
    with pytest.raises(ValueError, match=r"made inside torch\.inference_mode\(\).* make it outside"):
        evaluate(mine, labelled_by(TinyNet(), 10), QUICK)


@pytest.mark.parametrize("mode", ["inference mode", "autocast", "default dtype"])
def test_finetuning_computes_the_same_in_anybodys_modes(tmp_path: Path, mode: str) -> None:
    folder = export_encoder(tmp_path / "model")
    settings: dict[str, Any] = {"protocol": "sff", "epochs": 1, "batch_size": 16, "augment": "crop-flip", "cpu": True}
    plain = advcl_hub.finetune(folder, "fake:40", output=tmp_path / "plain", size=16, **settings)
    with MODES[mode]():
        other = advcl_hub.finetune(folder, "fake:40", output=tmp_path / "other", size=16, **settings)
    weights = [(run.folder / "model.safetensors").read_bytes() for run in (plain, other)]
    assert weights[0] == weights[1]


# ---- labels ----------------------------------------------------------------------------------------


def test_labels_of_other_integers_are_taken_and_others_refused() -> None:
    data = blobs(4)
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert ImageData(data.images, data.labels.to(dtype), data.indices.int(), data.classes, "x").labels.dtype == torch.int64
    one_hot = nn.functional.one_hot(data.labels)
    for labels, remedy in (
        (data.labels.double(), r"labels are torch\.float64 \(12,\), expected torch\.int64 \(N,\): labels\.long\(\)"),
        (one_hot, r"labels are torch\.int64 \(12, 3\), expected .*: of one-hot labels take labels\.argmax\(1\)"),
        (data.labels > 0, r"labels are torch\.bool"),
    ):
        with pytest.raises(ValueError, match=remedy):
            ImageData(data.images, labels, data.indices, data.classes, "x")
    images = data.images
    assert isinstance(images, Tensor)
    with pytest.raises(ValueError, match=r"images are torch\.float32 .*\(images \* 255\)\.round\(\)\.to\(torch\.uint8\)"):
        ImageData(images / 255, data.labels, data.indices, data.classes, "x")


@pytest.mark.parametrize("mode", ["inference mode", "autocast", "default dtype", "default device"])
def test_exports_are_written_and_verified_in_anybodys_modes(tmp_path: Path, mode: str) -> None:
    model = timm.create_model("resnet8_cifar", num_classes=3).eval()
    plain = export_folder(model, tmp_path / "plain", results={})
    with MODES[mode]():
        other = export_folder(model, tmp_path / "other", results={})
        advcl_hub.verify(plain)
    for name in ("model.safetensors", "golden.safetensors"):
        assert (plain / name).read_bytes() == (other / name).read_bytes()
