"""Fixtures of all tests; tests/conftest.py loads them."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from advcl_hub import files
from advcl_hub.data import decoding, image_data
from advcl_hub.evaluation import autoattack
from advcl_hub.training import pictures
from tests.support import ROOT, image_files, properties  # noqa: F401  # its profile counts for all property tests
from tests.support.hub_client import TOKENS, Client, open_client
from tests.support.hub_server import Hub
from tests.support.image_files import write_pets
from tests.support.kept_registry import kept_registry
from tests.support.small_encoders import SMALL_RESNET, SMALL_VIT, export_encoder, save_encoder
from tests.support.tiny_classifiers import shorten


def start_anew() -> None:
    """Puts back what an earlier test may have changed: random generators, accelerate's state, the warnings already given."""
    random.seed(0)
    np.random.seed(0)  # what others use
    torch.manual_seed(0)
    image_files.RANDOM.seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    files._warned.clear()


@pytest.fixture(autouse=True, scope="module")
def new_module() -> None:
    """For the fixtures of a module of tests."""
    start_anew()


@pytest.fixture(autouse=True)
def new_test() -> None:
    """For each test."""
    start_anew()


@pytest.fixture(autouse=True, scope="module")
def other_registry() -> Iterator[None]:
    """Names that a module of tests registers are gone for the next, whichever shares its process."""
    with kept_registry():
        yield


@pytest.fixture(autouse=True, scope="session")
def digits_are_resized_once() -> Iterator[None]:
    """Many tests read scikit-learn's digits, and to resize them takes longer than to train on some of them."""
    read, kept = decoding.read_images, {}

    def read_images(items: Any, names: Any, channels: int, fit: Any) -> Any:
        if not (isinstance(items[0], np.ndarray) and items[0].shape == (8, 8) and isinstance(fit, decoding.Square)):
            return read(items, names, channels, fit)
        key = (np.stack(items).tobytes(), channels, fit)
        if key not in kept:
            kept[key] = read(items, names, channels, fit)
        images, failures = kept[key]
        return images.clone(), dict(failures)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(image_data, "read_images", read_images)
        yield


@pytest.fixture(autouse=True)
def kept_trace() -> Iterator[None]:
    """Puts the trace function back: the bare AutoAttack removes it, and coverage or a debugger would see nothing afterwards."""
    trace = sys.gettrace()
    yield
    sys.settrace(trace)


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    """A Hub on this machine."""
    with Hub(TOKENS).serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The real Hub client that knows `served`, in a process of its own."""
    with open_client(served, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """Folder with CIFAR-10 as parquet files, as in the Hugging Face dataset; skips where it is absent."""
    folder = Path(os.environ.get("ADVCL_TEST_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    if not any(folder.glob("train-*.parquet")) or not any(folder.glob("test-*.parquet")):
        pytest.skip(
            f"needs real CIFAR-10: no train-*.parquet and test-*.parquet in {folder}; "
            "set ADVCL_TEST_DATA to the folder that holds cifar10/"
        )
    return folder


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A small ImageFolder of two classes."""
    return write_pets(tmp_path)


@pytest.fixture(params=["in memory", "lazy"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with images in memory, and with images decoded when they are needed."""
    if request.param == "lazy":
        monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 0)
    return str(request.param)


_savefig, _without_formulas = Figure.savefig, pictures._without_formulas


def _save_blank(figure: Figure, *args: Any, **options: Any) -> None:
    figure.set_layout_engine("none")
    for axis in figure.axes:
        axis.set_visible(False)
    _savefig(figure, *args, **{"pil_kwargs": {"compress_level": 1}, **options})


@pytest.fixture(autouse=True, scope="module")
def blank_pictures() -> Iterator[None]:
    """Figures are made and written, but not rendered, which takes longer than tiny runs train; see `rendered`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Figure, "savefig", _save_blank)
        patched.setattr(pictures, "_without_formulas", lambda figure: None)  # it would make every tick, which is slow
        yield


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are rendered: for a test that looks at one, or needs the errors of drawing it."""
    monkeypatch.setattr(Figure, "savefig", _savefig)
    monkeypatch.setattr(pictures, "_without_formulas", _without_formulas)


@pytest.fixture
def short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations run the attacks of AutoAttack with fewer steps."""
    monkeypatch.setattr(autoattack, "build", autoattack.build)  # put back afterwards
    shorten()


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder in an export folder, to read and not to change; its batch norms have seen digits."""
    return export_encoder(tmp_path_factory.mktemp("encoders") / "resnet", **SMALL_RESNET)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder without batch norms."""
    return export_encoder(tmp_path_factory.mktemp("encoders") / "vit", "vit_tiny_patch16_224", **SMALL_VIT)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained timm model in a folder."""
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")
