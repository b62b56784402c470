"""advcl-hub lp-aff as typed: a real process that is killed in every stage, two that share the work, words for mistakes."""

import json
import signal
from pathlib import Path

import pytest
import torch

from advcl_hub.hub.export import load_folder
from advcl_hub.training.runlog import read_log
from advcl_hub.training.state import FILE
from tests.support.commands import invoke, run, start
from tests.support.held import HELD

QUICK = ("--data", "fake:80", "--batch-size", "16", "--steps", "20", "--epochs", "2", "--head-epochs", "4", "--clusters", "4")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_folder(output / "export").state_dict()


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_if_nothing_had_happened(resnet: Path, tmp_path: Path) -> None:
    arguments = (resnet, *QUICK, "--checkpoint-minutes", "0", "--ema-decay", "0.5", "--cpu")
    said = run("lp-aff", *arguments, "--output", tmp_path / "whole")
    assert f'timm.create_model("local-dir:{tmp_path / "whole" / "export"}", pretrained=True)' in said
    assert f"advcl-hub finetune {tmp_path / 'whole' / 'export'} --data fake:80 --protocol slf" in said
    killed = tmp_path / "killed"
    for stage, step, how in (("head", 3, signal.SIGKILL), ("full", 1, signal.SIGKILL), ("full", 5, signal.SIGINT)):
        with start("lp-aff", *arguments, "--output", killed, held=f"at_step({step}, '{stage}')") as process:
            process.wait_for(HELD)
            process.send_signal(how)
            out, _ = process.communicate()
        assert not (killed / "export").exists()
        assert how == signal.SIGKILL or (process.returncode == 0 and f"Stopped with a checkpoint in {killed}" in out)
        assert how == signal.SIGKILL or (killed / stage / FILE).is_file()
    run("lp-aff", *arguments, "--output", killed)
    a, b = weights(tmp_path / "whole"), weights(killed)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert [r["step"] for r in read_log(killed / "full")] == list(range(1, 11)), "nothing was logged twice"


@pytest.mark.slow
def test_two_processes_equal_one(vit: Path, tmp_path: Path) -> None:
    """The same clusters, augmentations and attacks, whoever computes them: this network has no batch statistics."""
    results = []
    for count in (1, 2):
        options = (*QUICK, "--steps", "2", "--lr", "0.01", "--cpu", "--output", tmp_path / str(count))
        said = run("lp-aff", vit, *options, processes=count)
        assert said.count("Use it:") == 1, "one process speaks"
        results.append(weights(tmp_path / str(count)))
    records = [json.loads((tmp_path / str(n) / "export" / "results.json").read_text(encoding="utf-8")) for n in (1, 2)]
    assert records[0]["pseudo_labels"]["sha256"] == records[1]["pseudo_labels"]["sha256"]
    assert [record["places"][0]["hardware"]["processes"] for record in records] == [1, 2]
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=2e-5)
    before = load_folder(vit).state_dict()
    assert all(not torch.equal(results[0][key], before[key]) for key in ("pos_embed", "blocks.0.attn.qkv.weight"))


def test_the_encoder_goes_through_the_other_commands(resnet: Path, tmp_path: Path) -> None:
    output, encoder = tmp_path / "pp", tmp_path / "pp" / "export"
    quick = ("--data", "fake:80", "--batch-size", "20", "--epochs", "1", "--cpu")
    assert invoke("lp-aff", resnet, *quick, "--head-epochs", "1", "--steps", "1", "--output", output).exit_code == 0
    assert "every sha256 is right" in invoke("verify", encoder).stdout
    assert invoke("finetune", encoder, *quick, "--output", tmp_path / "slf").exit_code == 0
    attack = ("--eps", "1/255", "--steps", "1", "--check-images", "0", "--device", "cpu", "--n", "20")
    measured = invoke("evaluate", tmp_path / "slf/classifier", "--data", "fake:80", *attack, "--output", tmp_path / "e")
    assert measured.exit_code == 0, measured.stderr
    assert invoke("card", encoder, tmp_path / "e").exit_code == 0
    table = invoke("report", tmp_path / "e")
    assert table.exit_code == 0 and "slf/classifier" in table.stdout
    told = invoke("info", encoder).stdout
    assert "10 clusters of the features of local-dir:resnet in place of labels" in told and "PGD-1" in told
    assert invoke("verify", encoder).exit_code == 0, "the card changed no weights"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "unknown data source 'nowhere'"),
        (("--data", "cifar10"), "cifar10 needs root"),
        (("--data", "fake:80", "--clusters", "1"), "clusters is 1, expected at least 2"),
        (("--data", "fake:80", "--eps", "8"), "did you mean 8/255"),
        (("--data", "fake:80", "--batch-size", "81"), "A batch of 81 needs as many training images"),
        (("--data", "fake:80", "--clean", "no/such"), "neither a folder nor a model that timm knows"),
    ],
)
def test_mistakes_are_one_line(resnet: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("lp-aff", resnet, *arguments, "--output", tmp_path / "run")
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and message in line
