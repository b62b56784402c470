"""advcl-hub finetune and presets as typed: real processes that are killed, several that share the work, words for mistakes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from advcl_hub.finetuning.presets import table
from advcl_hub.hub.export import load_folder
from advcl_hub.training.runlog import read_log
from advcl_hub.training.state import FILE
from tests.support import warm
from tests.support.commands import invoke, run, start
from tests.support.held import HELD
from tests.support.hub_server import serve_hub
from tests.support.slow import slow

QUICK = ("--data", "fake:80", "--batch-size", "16", "--steps", "1", "--epochs", "2", "--lr", "0.1")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_folder(output / "classifier").state_dict()


@pytest.mark.slow
def test_killed_twice_it_ends_as_if_nothing_had_happened(resnet: Path, tmp_path: Path) -> None:
    arguments = (resnet, *QUICK, "--protocol", "aff", "--checkpoint-minutes", "0", "--ema-decay", "0.5", "--steps", "20")
    said = run("finetune", *arguments, "--output", tmp_path / "whole")
    assert f'timm.create_model("local-dir:{tmp_path / "whole" / "classifier"}", pretrained=True)' in said
    assert f"advcl-hub evaluate {tmp_path / 'whole' / 'classifier'} --data fake:80" in said
    killed = tmp_path / "killed"
    for step, how in ((2, signal.SIGKILL), (5, signal.SIGINT)):
        with start("finetune", *arguments, "--output", killed, held=f"at_step({step})") as process:
            process.wait_for(HELD)
            process.send_signal(how)
            out, _ = process.communicate()
        assert (killed / FILE).is_file() and not (killed / "classifier").exists()
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 0)
        assert how == signal.SIGKILL or "Stopped with a checkpoint" in out
    often = ("--checkpoint-minutes", "5")  # how it is watched may change
    with start("finetune", *arguments, *often, "--output", killed) as process:
        assert "Note:" not in process.communicate()[1] and process.returncode == 0
    a, b = weights(tmp_path / "whole"), weights(killed)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert [r["step"] for r in read_log(killed)] == list(range(1, 11)), "nothing was logged twice"


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        slow("resnet", ("--protocol", "slf", "--augment", "none", "--val-fraction", "0.2")),
        ("vit", ("--protocol", "aff", "--accumulate", "2", "--ema-decay", "0.5")),
    ],
)
def test_two_processes_equal_one(
    request: pytest.FixtureRequest, tmp_path: Path, encoder: str, options: tuple[str, ...]
) -> None:
    """The same images, augmentations and attacks, whoever computes them: no batch statistics are trained here."""
    arguments = (request.getfixturevalue(encoder), *QUICK, *options)
    results = []
    for count in (1, 2):
        said = run("finetune", *arguments, "--output", tmp_path / str(count), processes=count)
        assert said.count("Use it:") == 1, "one process speaks"
        results.append(weights(tmp_path / str(count)))
    record = json.loads((tmp_path / "2" / "classifier" / "results.json").read_text(encoding="utf-8"))
    assert record["places"][0]["hardware"]["processes"] == 2 and record["step"] == (6 if "none" in options else 10)
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=2e-5)
    moved = {key for key in results[0] if results[0][key].is_floating_point() and results[0][key].abs().max() > 1e-3}
    assert any(key.startswith(("fc", "head")) for key in moved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "fake:80", "--protocol", "sff", "--preset", "deacl"), "The preset deacl has no sff"),
        (("--data", "nowhere"), "unknown data source 'nowhere'"),
        (("--data", "folder:no/such"), "folder no/such does not exist"),
        (("--data", "cifar10"), "cifar10 needs root"),
        (("--data", "fake:80", "--shots", "9"), "9 images of every class were asked for"),
        (("--data", "fake:80", "--eps", "8", "--protocol", "aff"), "did you mean 8/255"),
        (("--data", "fake:80", "--batch-size", "81"), "A batch of 81 needs as many training images"),
    ],
)
def test_mistakes_are_one_line(resnet: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("finetune", resnet, *arguments, "--output", tmp_path / "run")
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and message in line


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--time-budget", "9", "is not a duration such as 90s, 9m or 2h"),
        ("--eps", "eight", "is not a number such as 8/255"),
        ("--augment", "mixup", "is not one of 'crop-flip', 'crop', 'none'"),
        ("--protocol", "lsf", "is not one of 'slf', 'alf', 'aff', 'sff'"),
    ],
)
def test_options_that_cannot_be_read(resnet: Path, option: str, value: str, message: str) -> None:
    result = invoke("finetune", resnet, "--data", "fake:80", option, value)
    assert result.exit_code == 2 and message in result.stderr


def test_the_presets_are_listed() -> None:
    result = invoke("presets")
    assert result.exit_code == 0 and result.stdout == f"{table()}\n"


def test_an_output_that_cannot_be_written_is_refused_before_work(resnet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = invoke("finetune", resnet, *QUICK, "--output", tmp_path / "file" / "run")
    assert result.exit_code == 1 and "cannot be written" in result.stderr


def test_an_encoder_of_the_hub(vit: Path, tmp_path: Path) -> None:
    """With the arguments of its architecture, so that the result opens as it is."""
    shutil.copytree(vit, tmp_path / "hub" / "org" / "vit")
    with serve_hub(tmp_path / "hub") as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
        command = ("-m", "advcl_hub.cli", "finetune", "hf-hub:org/vit", *QUICK, "--output", tmp_path / "run")
        warm.run(*command, env=environment, code=0)
    record = json.loads((tmp_path / "run" / "classifier" / "results.json").read_text(encoding="utf-8"))
    assert record["encoder"]["name"] == "hf-hub:org/vit" and record["encoder"]["provenance"]["kind"] == "encoder"
    found, encoder = weights(tmp_path / "run"), load_folder(vit).state_dict()
    assert found["pos_embed"].shape == (1, 17, 16) and torch.equal(found["pos_embed"], encoder["pos_embed"])


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    models = ("ours=resnet8_cifar", "ours=resnet10_cifar")
    result = invoke("transfer", *models, "--to", "fake:80", "--output", tmp_path / "grid")
    assert (result.exit_code, result.stderr) == (1, "Error: Two models have the same name.\n")
    assert not (tmp_path / "grid").exists()
