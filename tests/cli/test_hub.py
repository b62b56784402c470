"""The commands list, info, pull, push, verify, card and convert, as they are typed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from advcl_hub import releases
from advcl_hub.hub.export import WEIGHTS, load_folder, verify_folder
from advcl_hub.hub.push_pull import Push
from advcl_hub.records import RESULTS
from tests.support import warm
from tests.support.commands import invoke
from tests.support.hub_client import TOKENS, WRITER
from tests.support.hub_server import Hub, flipped
from tests.support.small_encoders import export_encoder

COMMANDS = ("list", "info", "pull", "verify", "card", "push", "convert")


def refused(*arguments: object) -> str:
    """The one line that a refused command prints."""
    result = invoke(*arguments)
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1, result.output
    return result.output.removeprefix("Error: ").strip()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("command") / "encoder")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(TOKENS).serve() as hub:
        yield hub


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    text = invoke(command, "--help").output
    assert f"advcl-hub {command}" in text and "Example" in text


def test_the_list_of_commands_has_whole_sentences() -> None:
    lines = invoke("--help").output.partition("Commands:")[2].strip().splitlines()
    assert {line.split()[0] for line in lines} >= {*COMMANDS, "evaluate", "finetune"}
    assert not [line for line in lines if line.endswith("...")]


@pytest.mark.slow
def test_starting_takes_no_longer_than_importing_timm() -> None:
    """Nothing is imported that timm does not import, but for click and ourselves."""
    code = "import sys; import {}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = {}
    for module in ("timm", "advcl_hub.cli"):
        out = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
        loaded[module] = set(out.split())
    assert loaded["advcl_hub.cli"] - loaded["timm"] <= {"click", "advcl_hub", "_colorize"}


def test_list_for_people_and_for_programs() -> None:
    text = invoke("list").output
    found = json.loads(invoke("list", "--json").output)
    assert found.keys() == releases().keys()
    for name, entry in found.items():
        assert name in text and entry["files"][WEIGHTS]["sha256"] and entry["head"] in text
    assert "No released weights have 'nothing'" in refused("list", "nothing")


def test_without_released_weights_the_list_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advcl_hub.cli.hub.releases", dict)
    assert invoke("list").output == "There are no released weights.\n" and invoke("list", "--json").output == "{}\n"
    assert refused("list", "nothing") == "No released weights have 'nothing' in their name; there are none."


def test_completion_offers_the_names() -> None:
    names = list(releases())
    words = {"COMP_WORDS": "advcl-hub info resnet10", "COMP_CWORD": "2", "_ADVCL_HUB_COMPLETE": "bash_complete"}
    done = warm.run("-m", "advcl_hub.cli", env={**os.environ, **words}, code=0)
    offered = {line.partition(",")[2] for line in done.stdout.splitlines()}
    assert offered == {name for name in names if name.startswith("resnet10")} != set()


def test_info_card_and_verify_of_a_folder(export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "encoder"))
    text = invoke("info", folder).output
    assert text.startswith(f"# {folder}") and "Nothing was measured yet." in text
    assert json.loads(invoke("info", folder, "--json").output)["config"]["architecture"] == "resnet8_cifar"
    assert "every sha256 is right" in invoke("verify", folder).output
    assert "README.md" in invoke("card", folder, "--note", "A note.", "--name", "acme/x").output
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# acme/x" in card and "- A note." in card
    (folder / WEIGHTS).write_bytes(flipped((folder / WEIGHTS).read_bytes()))
    assert "not the file that was exported" in refused("verify", folder)
    assert "has no results.json" in refused("card", tmp_path)
    assert "no folder here, no released weights, and no repository" in refused("info", "resnet10")
    assert "has no results.json" in refused("card", folder, tmp_path)


def test_an_export_in_another_dtype(export: Path, tmp_path: Path) -> None:
    results = json.loads((export / RESULTS).read_text(encoding="utf-8"))
    source = Path(shutil.copytree(export, tmp_path / "source"))
    (source / RESULTS).write_text(json.dumps(results | {"evaluations": [{}], "notes": ["kept"]}), encoding="utf-8")
    assert "float16, verified" in invoke("convert", source, tmp_path / "half", "--dtype", "float16").output
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.6 * (export / WEIGHTS).stat().st_size
    verify_folder(tmp_path / "half")
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(load_folder(tmp_path / "half")(images), load_folder(export)(images), rtol=0.02, atol=0.02)
    record = json.loads((tmp_path / "half" / RESULTS).read_text(encoding="utf-8"))
    assert record["notes"] == ["kept"] and "evaluations" not in record
    assert record["rounded_from"] == {"dtype": "float32", "sha256": results["sha256"][WEIGHTS]}
    assert "choose another folder" in refused("convert", source, source, "--dtype", "float16")
    assert "choose another folder" in refused("convert", source, source / "half", "--dtype", "float16")
    assert "only --dtype can be changed (given: size)" in refused("convert", source, tmp_path / "x", "--size", "1")


def test_convert_a_published_checkpoint(tmp_path: Path) -> None:
    from advcl_hub.models import resnet18_cifar

    model = resnet18_cifar(channels=(8, 8, 8, 8), num_classes=3)
    names = {"downsample.": "shortcut.", "fc.": "linear."}
    state = model.state_dict()
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    torch.save({"net": state}, tmp_path / "ckpt.pth")
    assert "mean and std have to be given" in refused("convert", tmp_path / "ckpt.pth", tmp_path / "out")
    made = invoke("convert", tmp_path / "ckpt.pth", tmp_path / "out", "--mean", "0", "--std", "1", "--label-names", "a,b,c")
    assert made.exit_code == 0 and "layout kuangliu" in made.output and "Use it:" in made.output, made.output
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["label_names"] == ["a", "b", "c"]


def test_a_dry_push_names_what_goes_and_what_stays(export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "encoder"))
    (folder / ".env").write_text("HF_TOKEN=secret", encoding="utf-8")
    said = invoke("push", folder, "acme/x", "--dry-run").output.splitlines()
    assert said[-1] == f"  {'left out':>18}  .env" and "Would be uploaded to acme/x:" in said
    assert f"  {(folder / WEIGHTS).stat().st_size:>12,} bytes  {WEIGHTS}" in said
    done = json.loads(invoke("push", folder, "acme/x", "--dry-run", "--json").output)
    assert (done["repository"], done["version"], done["left_out"], done["commit"]) == ("acme/x", "v1", [".env"], None)
    assert done["files"][WEIGHTS] == (folder / WEIGHTS).stat().st_size and done["card"].startswith("---")


def test_a_pull_request_has_no_version_and_no_weights_to_use_yet(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Push("acme/x", None, {"a": 1}, (), "", commit="0123456789", url="https://hub/acme/x/discussions/1")
    monkeypatch.setattr("advcl_hub.cli.hub.push", lambda folder, repository, *, create_pr, **options: create_pr and done)
    assert invoke("push", export, "acme/x", "--create-pr").output == (
        "acme/x has (commit 01234567):\n             1 bytes  a\n"
        "Verified: downloaded again, every sha256 and the golden output are right.\nhttps://hub/acme/x/discussions/1\n"
    )


@pytest.mark.slow
def test_push_info_pull_and_verify_on_a_hub(export: Path, hub: Hub, tmp_path: Path) -> None:
    """In processes of their own, as they are typed in a shell."""
    environment = hub.environment(tmp_path / "home", WRITER)

    def typed(*arguments: object) -> str:
        done = warm.run("-m", "advcl_hub.cli", *arguments, env=environment, code=0)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    name = "acme/resnet8_cifar.test"
    dry = typed("push", export, name, "--dry-run")
    assert f"Would be uploaded to {name}:" in dry and not hub.repos
    pushed = typed("push", export, name, "--private")
    assert f"{name} has (commit " in pushed and "Verified: downloaded again" in pushed and hub.repos[name].private
    again = typed("push", export, name, "--private")
    assert f"{name} had everything already (commit " in again and "Verified" not in again
    assert f"# {name}" in typed("info", name)
    assert "complete and verified" in typed("pull", f"{name}@v1", tmp_path / "copy")
    assert verify_folder(tmp_path / "copy") == 0
    environment.pop("HF_TOKEN")
    done = warm.run("-m", "advcl_hub.cli", "verify", name, env=environment | {"HF_HOME": str(tmp_path / "fresh")})
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Error: ") and "or is private" in done.stderr
