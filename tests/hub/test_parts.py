"""Weights in parts: small files, what models share stored once, and the same file again in the end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from advcl_hub.files import file_sha256
from advcl_hub.hub.export import WEIGHTS
from advcl_hub.hub.parts import join, split
from tests.support.small_encoders import export_encoder


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """An encoder, a classifier with a head on it, and one whose weights all moved; 1.2 MB each but for the head."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layer{i}": torch.randn(300, 250, generator=generator) for i in range(4)}
    head = {"fc": torch.randn(10, 250, generator=generator)}
    moved = {key: value + 1 for key, value in base.items()}
    return {
        "encoder": write(tmp_path / "encoder", **base),
        "slf": write(tmp_path / "slf", **base, **head),
        "aff": write(tmp_path / "aff", **moved, **head),
    }


def test_parts_are_small_shared_and_give_the_files_again(folders: dict[str, Path], tmp_path: Path) -> None:
    limit = 1_000_000
    parts = split(folders, tmp_path / "parts", limit)
    files = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert files == sorted({file for names in parts.values() for file in names})
    assert max(path.stat().st_size for path in (tmp_path / "parts").iterdir()) <= limit
    assert len(parts["encoder"]) == 2 and parts["slf"][:2] == parts["encoder"]
    head = tmp_path / "parts" / parts["slf"][2]
    assert head.name == f"slf-{file_sha256(head)[:8]}.safetensors" and load_file(head).keys() == {"fc"}
    assert not set(parts["aff"]) & set(parts["slf"])
    for name, folder in folders.items():
        made = join(
            [tmp_path / "parts" / part for part in parts[name]], tmp_path / name / "joined", file_sha256(folder / WEIGHTS)
        )
        assert made.read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_tensor_that_differs_in_one_bit_is_not_shared(folders: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(folders["slf"] / WEIGHTS)
    state["layer3"][0, 0] = torch.nextafter(state["layer3"][0, 0], torch.tensor(9.0))
    folders["slf"] = write(tmp_path / "other", **state)
    parts = split(folders, tmp_path / "parts")
    assert not set(parts["slf"]) & set(parts["encoder"])


def test_a_real_classifier_with_a_frozen_encoder_costs_its_head(tmp_path: Path) -> None:
    encoder = export_encoder(tmp_path / "encoder")
    state = load_file(encoder / WEIGHTS)
    classifier = write(tmp_path / "classifier", **state, **{"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)})
    parts = split({"encoder": encoder, "slf": classifier}, tmp_path / "parts")
    assert (tmp_path / "parts" / parts["slf"][-1]).stat().st_size < 4_000


def test_a_tensor_larger_than_a_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder has a tensor too large for a file of 280,000 bytes"):
        split(folders, tmp_path / "parts", 280_000)


def test_weights_that_another_program_wrote_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """What it added to them would be lost, and with it their sha256."""
    weights = folders["slf"] / WEIGHTS
    save_file(load_file(weights), weights, metadata={"format": "pt", "author": "somebody"})
    with pytest.raises(ValueError, match=f"^{weights} was not written by advcl-hub: load the model and export it again"):
        split(folders, tmp_path / "parts")


def test_a_place_that_cannot_be_made_is_named_with_the_remedy(folders: dict[str, Path], tmp_path: Path) -> None:
    parts = [tmp_path / "parts" / part for part in split(folders, tmp_path / "parts")["aff"]]
    (tmp_path / "file").touch()
    message = f"^{tmp_path / 'file' / 'cache'} cannot be made \\(.+\\): give another cache_dir, or HF_HOME"
    with pytest.raises(OSError, match=message):
        join(parts, tmp_path / "file" / "cache" / WEIGHTS, "0" * 64)


def test_joining_refuses_what_is_not_whole_and_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    parts = [tmp_path / "parts" / part for part in split(folders, tmp_path / "parts", 1_000_000)["aff"]]
    target, sha256 = tmp_path / "new" / WEIGHTS, file_sha256(folders["aff"] / WEIGHTS)
    with pytest.raises(ValueError, match="do not give the weights"):
        join(parts[:1], target, sha256)
    assert list(target.parent.iterdir()) == []
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"{parts[1].name} is missing"):
        join(parts, target, sha256)
    parts[1].write_bytes((tmp_path / "elsewhere").read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{parts[1].name} is damaged"):
        join(parts, target, sha256)
    (tmp_path / "elsewhere").rename(parts[1])
    join(parts, target, sha256)
    parts[0].unlink()  # what is joined already needs no parts
    assert join(parts, target, sha256) == target


def test_other_weights_of_the_same_name_leave_the_parts_of_others_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """A classifier that shares an encoder's parts goes on to work when the encoder is written anew."""
    target = tmp_path / "parts"
    parts = split(folders, target)
    again = split({"encoder": folders["aff"]}, target)
    assert not set(again["encoder"]) & set(parts["slf"])
    join([target / part for part in parts["slf"]], tmp_path / "joined", file_sha256(folders["slf"] / WEIGHTS))


def test_frozen_parts_give_the_frozen_file(tmp_path: Path) -> None:
    """The sha256 of released weights is that of a file which safetensors writes again: another layout of it would show here."""
    parts = []
    for number, tensors in enumerate(({"b": torch.arange(6.0).half(), "a": torch.ones(2, 3)}, {"n": torch.tensor(7)})):
        parts.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, parts[-1])
    frozen = "b113b3aec9801af9507d5aac36e4e2f764061d48f1dcac85bd8f79e4d9a4c2bc"
    assert file_sha256(join(parts, tmp_path / "joined", frozen)) == frozen
