"""The benchmark: the published step is such a one, clocks and counters tell the truth, the command leaves files."""

import copy
import json
from pathlib import Path

import pyautoattack
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import advcl_hub  # noqa: F401
from advcl_hub.data import load_data
from advcl_hub.opening import load_model
from advcl_hub.pretraining import METHODS, AdvCL, DeACL
from advcl_hub.pretraining.views import ViewConfig, Views, high_frequency
from tests.support.small_encoders import SMALL_RESNET, export_encoder
from tests.support.tiny_classifiers import labelled_by, shortened
from train.benchmark import methods, parts, processes, step, timing, use
from train.benchmark.__main__ import main
from train.benchmark.published import published_losses
from train.benchmark.report import Row, Section
from train.benchmark.timing import Timing

CPU = torch.device("cpu")


def test_the_published_step_has_the_losses_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways of writing it; that ours are the published numbers is shown in tests/pretraining/test_advcl_golden.py."""
    torch.manual_seed(0)
    network = AdvCL(timm.create_model("resnet8_cifar", num_classes=0), ks=(2, 5)).double()
    views = Views(*torch.rand(4, 6, 3, 32, 32, dtype=torch.float64))
    labels = torch.stack([torch.arange(6) % 2, torch.arange(6) % 5], 1)
    noise = (2 * torch.rand(2, 6, 3, 32, 32, dtype=torch.float64) - 1) * 8 / 255
    published = published_losses(copy.deepcopy(network), views, noise, labels)
    monkeypatch.setattr("advcl_hub.pretraining.advcl.uniform_start", lambda images, eps: images + noise)
    ours = network.losses(views, labels)
    torch.testing.assert_close(torch.stack(published), torch.stack(ours), rtol=1e-9, atol=0)


def test_contestants_take_turns_and_each_is_warmed_up() -> None:
    calls: list[str] = []

    def note(name: str) -> None:
        calls.append(name)

    times = timing.race({"a": lambda: note("a"), "b": lambda: note("b")}, CPU, rounds=2, warm_up=1)
    order = [name for i, name in enumerate(calls) if i == 0 or name != calls[i - 1]]
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert all(0 < t.low <= t.median <= t.high for t in times.values())


def test_what_is_fast_is_run_several_times_a_sample() -> None:
    calls = []
    timing.race({"fast": lambda: calls.append(1)}, CPU, rounds=1)
    assert len(calls) > 100


def test_operations_of_a_convolution_and_a_product() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 8 * 8, 5, bias=False))
    x = torch.rand(2, 3, 8, 8)
    forward = 2 * 2 * (8 * 8 * 4 * 3 * 9 + 4 * 8 * 8 * 5)
    assert timing.count_flops(lambda: network(x)) == forward
    first = 2 * 2 * 8 * 8 * 4 * 3 * 9  # the images want no gradient
    assert timing.count_flops(lambda: network(x).sum().backward()) == 3 * forward - first


def test_an_attack_step_is_counted_although_it_differentiates_by_images() -> None:
    layer = nn.Linear(6, 7, bias=False).requires_grad_(False)
    x = torch.rand(3, 6, requires_grad=True)
    assert timing.count_flops(lambda: torch.autograd.grad(layer(x).sum(), x)) == 2 * (2 * 3 * 6 * 7)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux")
def test_peak_memory_sees_what_was_freed_again() -> None:
    def run() -> None:
        torch.ones(50_000_000).sum()  # 200 MB

    peak = timing.peak_memory(run, CPU)
    assert peak is not None and 190e6 < peak < 300e6
    idle = timing.peak_memory(lambda: None, CPU)
    assert idle is not None and idle < 20e6


def test_a_table_tells_rates_spread_and_ratio() -> None:
    rows = [Row("one", Timing(2.0, 1.0, 4.0), 100), Row("two", Timing(0.5, 0.5, 0.5), 50, {"memory, MB": 1234.5})]
    section = Section("x", "Title", rows, note="How.")
    assert section.table().splitlines() == [
        "## Title",
        "",
        "|  | images/s | ratio | memory, MB |",
        "| --- | --- | --- | --- |",
        "| one | 50 (25 to 100) | 1.00 |  |",
        "| two | 100 (100 to 100) | 2.00 | 1,234 |",
        "",
        "How.",
    ]


@pytest.mark.slow
def test_the_step_is_counted_in_forwards() -> None:
    """50 forwards an image as published, 35 with the clean views once, 19 with a single attack step (one is a forward pass)."""
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    chosen = [m for m in step.modes(False) if m.name in ("published step", "+ bf16", "attack 1 x 10/255")]
    section = step.measure("resnet8_cifar", images, chosen, rounds=1)
    forwards = [float(row.more["forwards an image"]) for row in section.rows]
    # The gradient of the first layer's input is left out for clean views, and ResNet-8's first layer is 4 % of it.
    assert forwards == pytest.approx([50, 35, 19], rel=0.03)
    assert all(row.items == 4 and row.timing.median > 0 for row in section.rows)


def test_views_image_by_image_are_such_views() -> None:
    images = load_data("fake:10").images
    assert isinstance(images, torch.Tensor)
    made = parts.PerImage(images, ViewConfig())[3]
    assert [tuple(v.shape) for v in made] == [(3, 32, 32)] * 4
    assert all(v.min() >= 0 and v.max() <= 1 for v in made[:3])
    torch.testing.assert_close(made[3], high_frequency(made[2][None], 8)[0])
    section = parts.measure_views(images, 5, rounds=1, workers=(0,), tell=lambda text: None)
    assert [row.items for row in section.rows] == [10, 10]


@pytest.mark.slow
def test_the_gradient_is_reduced_once_and_projections_are_gathered() -> None:
    section = processes.measure("resnet8_cifar", 4, [1, 2], 1, CPU, tell=lambda text: None)
    alone, two = section.rows
    assert (alone.items, two.items) == (4, 8)
    more = two.more
    assert more["reduced, MB"] == more["gradient, MB"] > 0
    # At every of the six evaluations four views of 128 numbers and a normaliser each; three of the four are not new.
    assert more["gathered, MB"] == pytest.approx(6 * 4 * 4 * (128 + 1) * 4 / 1e6)
    assert more["least to gather, MB"] == pytest.approx(4 * 4 * (3 * 128 + 6 * (128 + 4)) / 1e6)


@pytest.mark.slow
def test_evaluation_is_measured_beside_the_bare_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That every image ends alike is shown in tests/evaluation, where some survive."""
    build = pyautoattack.AutoAttack
    monkeypatch.setattr(pyautoattack, "AutoAttack", lambda *args, **options: shortened(build(*args, **options)))
    folder = str(export_encoder(tmp_path / "classifier", num_classes=10, **SMALL_RESNET))
    data = labelled_by(load_model(folder).model, 10, size=16)
    pgd, autoattack = use.measure_evaluation(folder, data, CPU, rounds=1, compiled=False, tell=lambda text: None)
    assert [row.name for row in pgd.rows] == ["foolbox", "ours"]
    assert [row.name for row in autoattack.rows] == ["pyautoattack", "ours"]
    assert len({row.more["robust"] for row in autoattack.rows}) == 1
    assert all(row.items == 10 and row.timing.median > 0 for row in [*pgd.rows, *autoattack.rows])


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_the_command_leaves_tables_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "resnet8_cifar", "--batch-size", "4", "--rounds", "1", "--no-compile", "--largest", "512"]
    main([*arguments, "--only", "contrastive", "evaluation", "probe", "--output", str(tmp_path)])
    shown = capsys.readouterr()
    assert "## Contrastive loss" in shown.out and "evaluation: left out, it needs CIFAR-10: --root DATA" in shown.out
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [s["name"] for s in record["sections"]] == ["contrastive", "probe"]
    assert record["command"].startswith("python -m train.benchmark --model resnet8_cifar")
    assert {"hardware", "versions", "date"} <= set(record)
    assert Image.open(tmp_path / "benchmark.png").size[0] > 500


@pytest.mark.slow
def test_every_method_takes_a_step_and_folding_changes_only_its_time() -> None:
    """Unfolded attacks give the adversarial images of folded ones, to rounding."""
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    section = methods.measure("resnet8_cifar", images, 1, lambda text: None)
    assert {row.name.split(",")[0] for row in section.rows} == set(METHODS)
    assert [row.name for row in section.rows if row.more["by folding"]] == ["deacl", "profeat", "pseudo_label_at"]
    network = DeACL(timm.create_model("resnet8_cifar", num_classes=0)).double()
    views, target = images / 255.0, torch.rand(8, 64, dtype=torch.float64)
    perturbed = []
    for attacked in (network.attack_copy, methods.Unfolded(network)):
        setattr(network, "attack_copy", attacked)  # noqa: B010
        torch.manual_seed(0)
        perturbed.append(network.perturb(views.double(), target))
        assert network.encoder.training and all(p.requires_grad for p in network.encoder.parameters())
    torch.testing.assert_close(perturbed[0], perturbed[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18_cifr"], "timm has no model 'resnet18_cifr'"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--largest", "100"], "--largest must be at least 512"),
        (["--root", "nowhere"], "nowhere"),  # before anything is measured
        (["--device", "cuda:7"], "cuda:7 cannot be used"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--output", str(tmp_path / "out")])
    assert message in str(refused.value) and "\n" not in str(refused.value)
