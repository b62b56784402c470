"""The command that makes a file of pseudo-labels, and shows its clusters."""

from pathlib import Path

import pytest

from advcl_hub.data import load_data
from advcl_hub.pretraining import load_pseudo_labels
from tests.support import warm
from train.cluster_report import purity
from train.pseudo_labels import main


def run_main(output: Path, encoder: str, *more: str) -> None:
    main(["--data", "digits", "--encoder", encoder, "--k", "2", "10", "--output", str(output), "--device", "cpu", *more])


@pytest.mark.slow
def test_command_on_digits_with_pixels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("-m", "train.pseudo_labels", "--data", "digits", "--encoder", "pixels")
    run = warm.run(*command, "--k", 2, 10, "--output", tmp_path, code=0)
    assert "written to" in run.stderr and "purity" in run.stdout
    caplog.set_level("INFO")
    run_main(tmp_path, "pixels")
    assert "found in the cache" in caplog.text and capsys.readouterr().out == run.stdout
    picture, path = sorted(tmp_path.iterdir())
    assert (picture.suffix, path.suffix) == (".png", ".safetensors")
    train, test = (load_data("digits", split) for split in ("train", "test"))
    made = load_pseudo_labels(path, train)
    assert 0.7 < purity(made.labels[:, 1], train.labels) < 0.9  # 10 clusters of digits: far from chance and from 1
    assert purity(load_pseudo_labels(path, test, "test").labels[:, 1], test.labels) > 0.7


def test_command_with_a_network(tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_main(tmp_path, f"local-dir:{tiny_encoder}", "--splits", "test", "--size", "16")
    (path,) = tmp_path.glob("*.safetensors")
    data = load_data("digits", "test", size=16)
    made = load_pseudo_labels(path, data, "test")
    assert made.provenance["encoder"] == "local-dir:tiny" and len(made.provenance["weights_sha256"]) == 64
    assert f"{purity(made.labels[:, 1], data.labels):.3f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="size"):
        load_pseudo_labels(path, load_data("digits", "test"), "test")


def test_command_prints_one_line_for_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: K = 5000 clusters need at least as many images, digits has 1438"):
        run_main(tmp_path, "pixels", "--k", "5000")
    assert not list(tmp_path.iterdir())
