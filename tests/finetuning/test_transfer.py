"""The grid: every cell is finetuned and evaluated once, whatever happens on the way, and stands in table, CSV and picture."""

import csv
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

import advcl_hub
from advcl_hub.cli import main
from advcl_hub.data import load_data
from advcl_hub.finetuning import transfer
from advcl_hub.finetuning.grid import markdown
from advcl_hub.finetuning.grid import picture as draw
from advcl_hub.training.state import FILE
from tests.support.image_files import write_pets
from tests.support.small_encoders import SMALL_RESNET, export_encoder
from train.inputs import load_training_data
from train.recipe import from_dict

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "steps": 1, "eps": 1 / 255, "lr": 0.1, "cpu": True}
MODULE = sys.modules["advcl_hub.finetuning.transfer"]  # the function of that name hides it


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("encoders") / "one", **SMALL_RESNET)


@pytest.fixture(scope="module")
def grid(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return advcl_hub.transfer(
        {"ours": encoder, "none": f"random:{encoder}"},
        ["fake:80", "digits"],
        ["slf", "aff"],
        shots=[2],
        n=20,
        evaluation=advcl_hub.Protocol(eps=1 / 255, steps=2, check_images=0),
        output=tmp_path_factory.mktemp("grid"),
        **QUICK,
    )


def test_every_cell_has_its_run_and_its_evaluation(grid: Any) -> None:
    assert grid.finished and len(grid.cells) == 8
    assert len({(c.encoder, c.protocol, c.shots, c.data) for c in grid.cells}) == 8
    for cell in grid.cells:
        run = cell.folder.parents[1]
        assert (run / "classifier" / "model.safetensors").is_file() and not (run / FILE).exists()
        assert (cell.folder / "results.json").is_file() and run.parents[2] == grid.output
        told = cell.evaluated["model"]["provenance"]
        assert told == cell.tuned and told["protocol"] == cell.protocol and told["data"]["shots"] == cell.shots
        assert told["encoder"]["name"].startswith("random:") is (cell.encoder == "none")
        assert cell.evaluated["data"]["name"] == cell.data and cell.evaluated["data"]["images"] == 20


def test_the_table_has_a_row_an_encoder_and_protocol_and_two_columns_a_data_set(grid: Any) -> None:
    text = grid.table()
    assert (grid.output / "report.md").read_text(encoding="utf-8") == f"# Transfer\n\n{text}\n\n![comparison](comparison.png)\n"
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert header == "| encoder | finetuning | fake:80 SA | fake:80 PGD-2 | digits SA | digits PGD-2 |"
    assert rule == "|---|---|---:|---:|---:|---:|" and len(rows) == 4
    cells = {(c.encoder, c.training, c.data): c for c in grid.cells}
    for row in rows:
        name, training, *figures = [part.strip() for part in row.strip("|").split("|")]
        expected = [
            f"{100 * v:.1f}" for d in ("fake:80", "digits") for c in [cells[name, training, d]] for v in (c.standard, c.robust)
        ]
        assert [figure.removesuffix(" (!)") for figure in figures] == expected
    assert "SLF, 2 shots on digits: preset advcl, 1 epoch over 20 images, batch 8, lr 0.1" in text
    assert "class-balanced 20 of 359 test images; PGD-2, Linf 1/255, step 0.25/255; seeds 0 and 0." in text
    assert "(!) ours, SLF, 2 shots, fake:80: Not checked for false robustness (check_images=0)." in text


def test_names_of_others_make_no_columns_headings_or_tags(grid: Any) -> None:
    cell = replace(grid.cells[0], encoder="a | b\n# <i>", data="x | y")
    assert cell.evaluated["warnings"]
    header, rule, row, _, *notes = markdown([cell]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 5 and row.startswith("| a / b # &lt;i> | ")
    assert all(not line or line.startswith(("- ", "Accuracy")) for line in notes)


def test_figures_of_several_attacks_have_none_in_their_heading(grid: Any) -> None:
    stronger = deepcopy(grid.cells[0].evaluated)
    stronger["protocol"]["steps"] = 50
    text = markdown([replace(grid.cells[0], evaluated=stronger), *grid.cells[1:]])
    assert "| fake:80 PGD |" in text
    notes = {line.partition(": ")[0]: line for line in text.splitlines() if "fake:80: preset" in line and "SLF" in line}
    assert "PGD-50, Linf 1/255, step" in notes["- ours"] and "PGD-2, Linf 1/255, step" in notes["- none"]


def test_the_csv_has_a_line_a_cell(grid: Any) -> None:
    with (grid.output / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    for line, cell in zip(lines, grid.cells, strict=True):
        assert (line["encoder"], line["protocol"], line["shots"]) == (cell.encoder, cell.protocol, str(cell.shots))
        assert (float(line["standard"]), float(line["robust"])) == (cell.standard, cell.robust)
        assert float(line["robust_low"]) <= cell.robust <= float(line["robust_high"])
        assert line["weights_sha256"] == cell.tuned["encoder"]["weights_sha256"] and line["train_images"] == str(
            10 * cell.shots
        )


@pytest.mark.usefixtures("rendered")
def test_the_picture_shows_every_data_set(grid: Any, tmp_path: Path) -> None:
    with Image.open(draw(tmp_path / "comparison.png", grid.cells)) as picture:
        assert picture.width > 1.5 * picture.height and len(picture.convert("RGB").getcolors(10**6) or []) > 50


def test_a_grid_goes_on_where_it_stopped(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in training, then in an evaluation, then between cells; nothing is trained or measured twice."""
    arguments: Any = ([encoder], ["fake:80"], ["slf", "aff"])
    options: Any = {"output": tmp_path, "n": 20, "evaluation": advcl_hub.Protocol(steps=1, check_images=0), **QUICK}
    first = advcl_hub.transfer(*arguments, time_budget=0, **options)
    assert not first.finished and first.cells == []
    evaluate = MODULE.evaluate
    monkeypatch.setattr(MODULE, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        advcl_hub.transfer(*arguments, **options)
    counts = {"finetune": 0, "evaluate": 0}

    def counted(name: str, function: Any) -> Any:
        def wrapped(*a: Any, **k: Any) -> Any:
            counts[name] += 1
            return function(*a, **k)

        return wrapped

    monkeypatch.setattr(MODULE, "evaluate", counted("evaluate", evaluate))
    done = advcl_hub.transfer(*arguments, **options)
    assert done.finished and [c.protocol for c in done.cells] == ["slf", "aff"] and counts["evaluate"] == 2
    before = (tmp_path / "results.csv").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    again = advcl_hub.transfer(*arguments, **options)
    assert again.table() == done.table() and (tmp_path / "results.csv").read_bytes() == before
    assert len(stamps) == 2 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_training_that_is_stopped_stops_the_grid(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune, tried = MODULE.finetune, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        tried.append(arguments[2])
        return finetune(*arguments, **options | {"time_budget": 0})

    monkeypatch.setattr(MODULE, "finetune", stopped)
    done = advcl_hub.transfer([encoder], ["fake:80"], ["slf", "aff"], output=tmp_path, time_budget=600, **QUICK)
    assert not done.finished and done.cells == [] and tried == ["slf"]
    assert len(list(tmp_path.rglob(FILE))) == 1 and not list(tmp_path.rglob("results.*"))


@pytest.mark.slow
def test_another_way_to_measure_costs_no_training_and_other_cells_stay_in_the_report(encoder: Path, tmp_path: Path) -> None:
    options: Any = {"output": tmp_path, "evaluation": advcl_hub.Protocol(steps=1, check_images=0), **QUICK}
    advcl_hub.transfer([encoder], ["fake:80"], ["slf"], n=20, **options)
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    again = advcl_hub.transfer([encoder], ["fake:80", "fake:80"], ["slf"], n=10**6, **options)
    assert [cell.evaluated["data"]["images"] for cell in again.cells] == [80]
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    other = advcl_hub.transfer([encoder], ["digits"], ["slf"], shots=[2], n=20, **options)
    assert len(other.cells) == 1
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        assert [(line["data"], line["evaluated_images"]) for line in csv.DictReader(file)] == [
            ("digits", "20"),
            ("fake:80", "80"),
        ]
    assert "digits SA" in (tmp_path / "report.md").read_text(encoding="utf-8") and "fake:80 SA" in (
        tmp_path / "report.md"
    ).read_text(encoding="utf-8")


def test_weights_that_may_have_seen_the_held_out_images_are_told(grid: Any, tmp_path: Path) -> None:
    classifier = next(tmp for tmp in sorted(grid.output.glob("ours/digits/aff*/classifier")))
    options: dict[str, Any] = {"shots": [2], "output": tmp_path, "time_budget": 0}
    with pytest.warns(UserWarning, match="tuned was finetuned with labels of digits: it may have seen the held-out images"):
        advcl_hub.transfer({"tuned": classifier}, ["digits"], ["slf"], held_out=0.1, **options, **QUICK)


@pytest.mark.slow
def test_held_out_images_of_the_training_split_take_the_place_of_the_test_split(encoder: Path, tmp_path: Path) -> None:
    """They are those of pretraining with the same fraction, and nothing is trained on them; the report says what they are."""
    options: Any = {"output": tmp_path, "n": None, "evaluation": advcl_hub.Protocol(steps=1, check_images=0), **QUICK}
    (cell,) = advcl_hub.transfer([encoder], ["digits"], ["slf"], held_out=0.1, **options).cells
    data = {"source": "digits", "size": cell.tuned["data"]["shape"][-1], "val_fraction": 0.1}
    train, held_out = load_training_data(from_dict({"model": "resnet8_cifar", "method": "simclr", "data": data}))
    assert held_out is not None and cell.tuned["data"]["sha256"] == train.fingerprint()
    assert cell.evaluated["data"]["sha256"] == held_out.fingerprint()
    assert cell.evaluated["data"]["images"] == cell.evaluated["data"]["of"] == len(held_out) != len(load_data("digits", "test"))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"all {len(held_out)} of {len(held_out)} held-out training images" in report and "digits-held-out-0.1 SA" in report
    assert "test images" not in report
    (cell,) = advcl_hub.transfer([encoder], ["digits"], ["slf"], **options).cells  # a grid of both ways
    assert "test images" in (tmp_path / "report.md").read_text(encoding="utf-8") and cell.data == "digits"


def test_files_that_cannot_be_read_are_not_counted_on(encoder: Path, tmp_path: Path) -> None:
    pets = write_pets(tmp_path)
    (pets / "test" / "cat" / "1.png").write_bytes(b"no image")
    options: Any = {"output": tmp_path / "grid", "evaluation": advcl_hub.Protocol(steps=1, check_images=0), **QUICK}
    with pytest.warns(UserWarning, match="1 of 4 images cannot be read"):
        done = advcl_hub.transfer([encoder], [f"folder:{pets}"], n=4, **{**options, "batch_size": 2})
    assert done.finished and done.cells[0].evaluated["data"]["images"] == 3


def test_the_command_prints_the_table(encoder: Path, tmp_path: Path) -> None:
    options = ("--protocols", "slf", "--shots", "2,all", "--n", "0", "--epochs", "1", "--batch-size", "8", "--steps", "1")
    arguments = ["transfer", f"ours={encoder}", "--to", "fake:80", *options, "--check-images", "0", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert "| ours | SLF, 2 shots |" in result.stdout and "| ours | SLF |" in result.stdout
    assert "all 80 of 80 test images" in result.stdout and f"picture: {tmp_path}" in result.stdout


@pytest.mark.parametrize(
    ("models", "to", "protocols", "options", "message"),
    [
        (["no/such"], ["fake:80"], ["slf"], {}, "neither a folder nor a model"),
        ([], ["fake:80"], ["slf"], {}, "No model was given"),
        (
            ["ENCODER"],
            ["fake:80"],
            ["slf"],
            {"shots": [2, 9]},
            "9 images of every class were asked for, fake:80 has 8 of one class",
        ),
        (["ENCODER", "ENCODER"], ["fake:80"], ["slf"], {}, "The same model was given twice"),
        (
            ["one/export", "one export"],
            ["fake:80"],
            ["slf"],
            {},
            "cannot be told apart as folders: one/export, one export. Give them names: NAME=MODEL",
        ),
        (["ENCODER"], ["fake:80", "cifar11"], ["slf"], {}, "unknown data source 'cifar11'"),
        (["ENCODER"], ["fake:80"], ["slf", "lsf"], {}, "protocol is 'lsf'"),
        (["ENCODER"], ["fake:80"], ["slf", "sff"], {"preset": "deacl"}, "The preset deacl has no sff"),
        (["ENCODER"], [], ["slf"], {}, "needs a data set and a protocol"),
        (["ENCODER"], ["fake:80"], ["slf"], {"epoch": 1}, "Did you mean 'epochs'"),
        (["ENCODER"], ["fake:80"], ["slf"], {"held_out": 1.0}, "held_out is 1.0, expected a share"),
        (["ENCODER"], ["fake:80"], ["slf"], {"held_out": 0.5, "shots": [5]}, "fake:80 has 4 of one class after 0.5"),
        (["ENCODER"], ["fake:80"], ["slf"], {"held_out": 0.01, "shots": [8]}, "fake:80 has 7 of one class after 0.01"),
        (["ENCODER"], ["fake:10"], ["slf"], {"held_out": 0.5}, "label 0 has a single image"),
    ],
)
def test_what_any_cell_would_refuse_is_said_before_the_first_trains(
    encoder: Path, tmp_path: Path, models: list[str], to: list[str], protocols: list[str], options: dict[str, Any], message: str
) -> None:
    named = [str(encoder) if model == "ENCODER" else model for model in models]
    with pytest.raises((ValueError, OSError), match=message):
        transfer(named, to, protocols, output=tmp_path / "grid", **options)
    assert not (tmp_path / "grid").exists()
