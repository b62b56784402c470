"""A run goes on with the very images and labels of its checkpoint, and says where it was continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from advcl_hub.data import load_data
from advcl_hub.pretraining.pseudo_labels import PseudoLabels
from train.inputs import continue_provenance, provenance


def facts(seed: int = 0, file: str = "a.safetensors", source: str = "fake:40", teacher: str = "a") -> dict[str, Any]:
    start = {"name": "runs/simclr", "weights_sha256": teacher, "provenance": {"recipe": {}}}
    labels = torch.randint(3, (40, 1), generator=torch.Generator().manual_seed(seed))
    return provenance(load_data(source), PseudoLabels(labels, (3,), {"file": file}), start, Accelerator(cpu=True))


def test_the_same_data_go_on_even_from_a_file_of_another_name(tmp_path: Path) -> None:
    assert continue_provenance(facts(), facts(file="b.safetensors"), tmp_path) == facts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was trained on other pseudo-labels"),
        ({"source": "fake:41"}, "was trained on other data"),
        (
            {"teacher": "b"},
            r"started from another encoder: runs/simclr \(weights_sha256 a\), now runs/simclr \(weights_sha256 b\)",
        ),
    ],
)
def test_other_images_labels_or_weights_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*Choose another --output"):
        continue_provenance(facts(), facts(**change), tmp_path)


def test_every_place_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = facts(), facts()
    second["hardware"] = {"device": "another", "processes": 2}
    both = continue_provenance(first, second, tmp_path)
    assert "not bit by bit" in capsys.readouterr().err
    assert both["hardware"] == first["hardware"]
    assert [place["hardware"] for place in both["continued_on"]] == [second["hardware"]]
    assert continue_provenance(both, second, tmp_path) == both and not capsys.readouterr().err
    assert len(continue_provenance(both, first, tmp_path)["continued_on"]) == 2
