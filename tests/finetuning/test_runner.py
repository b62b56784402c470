"""Finetuning in this process: what each protocol trains, what it leaves, how it goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import advcl_hub
from advcl_hub.data import ImageData, few_shot, load_data
from advcl_hub.evaluation import Robustness
from advcl_hub.finetuning import Finetuned, Settings
from advcl_hub.finetuning import trainer as module
from advcl_hub.finetuning.encoder import open_encoder
from advcl_hub.finetuning.features import extract_features
from advcl_hub.finetuning.runner import default_output
from advcl_hub.hub.export import export_folder, load_folder, verify_folder
from advcl_hub.training import loop
from advcl_hub.training.runlog import read_log
from advcl_hub.training.state import FILE
from tests.support.slow import slow
from tests.support.small_encoders import SMALL_RESNET, export_encoder, relabelled
from tests.support.speed import channels_last


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose features tell digits apart."""
    folder = tmp_path_factory.mktemp("encoders")
    start = export_encoder(folder / "start", **SMALL_RESNET)
    settings = {"epochs": 10, "milestones": (8,), "lr": 0.3, "batch_size": 32, "augment": "none", "shots": 60}
    model = advcl_hub.finetune(start, "digits", "sff", output=folder / "run", **settings).load()
    model.reset_classifier(0)
    return export_folder(model, folder / "resnet", results={"kind": "encoder"}, model_args=SMALL_RESNET)


def weights(tuned: Finetuned) -> dict[str, Tensor]:
    return tuned.load().state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {key for key in a if torch.equal(a[key], b[key])}


def split(state: dict[str, Tensor]) -> tuple[set[str], set[str], set[str]]:
    """Names of the head, of batch-norm statistics and of all other tensors."""
    head = {key for key in state if key.startswith(("fc.", "head."))}
    statistics = {key for key in state if "running_" in key or "num_batches" in key}
    return head, statistics, state.keys() - head - statistics


@pytest.mark.parametrize(
    ("protocol", "preset"),
    [("slf", "advcl"), ("alf", "advcl"), ("aff", "advcl"), ("sff", "advcl"), ("slf", "deacl"), ("alf", "deacl")],
)
def test_what_a_protocol_trains(run: Callable[..., Finetuned], resnet: Path, protocol: str, preset: str) -> None:
    tuned, encoder = run(protocol, preset=preset), load_folder(resnet).state_dict()
    found = weights(tuned)
    head, statistics, rest = split(found)
    assert len(head) == 2 and len(statistics) == 3 * 9 and all(found[key].abs().max() > 0 for key in head)
    body = {key: found[key] for key in statistics | rest}
    kept = same(body, encoder)
    assert kept == (body.keys() if protocol in ("slf", "alf") else set())
    log = read_log(tuned.output)
    assert [r["step"] for r in log][-1] == 10 and {r["epoch"] for r in log} >= {1.0, 2.0}
    assert (log[-1]["robust"] > 0) is (protocol in ("alf", "aff")) and (log[-1]["natural"] > 0) is (protocol != "alf")


# Learning rate, eps in 1/255, and what must at least be reached, clean and under PGD-5.
LEARNS = {"slf": (0.5, 16, 0.5, 0.0), "alf": (0.5, 2, 0.5, 0.3), "aff": (0.3, 16, 0.4, 0.15), "sff": (0.3, 16, 0.5, 0.0)}


@pytest.mark.parametrize("protocol", ["sff", slow("slf"), slow("alf"), slow("aff")])
def test_digits_are_learned_and_evaluated(run: Callable[..., Finetuned], resnet: Path, protocol: str) -> None:
    lr, eps, standard, robust = LEARNS[protocol]
    settings = {"epochs": 10, "milestones": (8,), "lr": lr, "augment": "crop", "batch_size": 32}
    tuned = run(protocol, "digits", eps=eps / 255, steps=3, shots=40, **settings)
    assert tuned.finished and not (tuned.output / FILE).exists() and verify_folder(tuned.folder) < 1e-3
    left = {path.name for path in tuned.output.iterdir()}
    assert left == {"batch.png", "classifier", "curves.png", "log.jsonl", "tensorboard"}
    model = timm.create_model(f"local-dir:{tuned.folder}", pretrained=True)
    assert model.num_classes == 10 and model.pretrained_cfg["label_names"] == list(map(str, range(10)))
    attack = advcl_hub.Protocol(eps=eps / 255, steps=5, check_images=0)
    result = advcl_hub.evaluate(tuned.folder, "digits", attack, n=200, progress=False)
    assert result.robust is not None and result.standard > standard and result.robust >= robust
    losses = [r["total"] for r in read_log(tuned.output)]
    assert losses[-1] < 0.9 * losses[0]
    with Image.open(tuned.output / "batch.png") as picture:  # a row each: image, augmented and, attacked, two more
        assert picture.height == (440 if protocol in ("alf", "aff") else 220)
    told = result.record["model"]["provenance"]
    assert (told["protocol"], told["preset"], told["branch"]) == (protocol, "advcl", "adv")
    assert told["encoder"]["name"] == "/".join(resnet.parts[-2:]) and told["encoder"]["provenance"]["kind"] == "encoder"
    assert (told["data"]["name"], told["data"]["split"], told["data"]["shots"]) == ("digits", "train", 40)
    assert (told["data"]["images"], told["settings"]["seed"], told["chosen"]) == (400, 0, "the last epoch")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageData, ImageData]:
    """An encoder for 32x32 images, and some of Fashion-MNIST, which are 28x28."""
    try:
        train, test = (load_data("fashion-mnist", split) for split in ("train", "test"))
    except FileNotFoundError:
        pytest.skip("needs Fashion-MNIST: Debian's package dataset-fashion-mnist")
    encoder = export_encoder(tmp_path_factory.mktemp("encoders") / "fashion", size=32, **SMALL_RESNET)
    return encoder, few_shot(train, 20), few_shot(test, 10)


@pytest.mark.parametrize("protocol", LEARNS)
def test_fashion_mnist_is_enlarged_inside_the_attacked_function(
    run: Callable[..., Finetuned], fashion: tuple[Path, ImageData, ImageData], protocol: str
) -> None:
    encoder, train, test = fashion
    tuned = run(protocol, train, model=encoder, epochs=12, lr=0.3, eps=2 / 255)
    assert tuned.record["data"]["shape"] == [3, 28, 28] and tuned.load().pretrained_cfg["input_size"] == (3, 32, 32)
    attack = advcl_hub.Protocol(eps=2 / 255, steps=2, check_images=0)
    result = advcl_hub.evaluate(tuned.folder, test, attack, progress=False)
    assert result.record["model"]["attacked_at"] == [3, 28, 28] and result.record["model"]["fitted_inside"] == "enlarged"
    assert result.record["classes"][0] == "T-shirt/top" and result.standard > 0.2  # by chance: 0.1


def test_a_frozen_encoder_and_fixed_images_are_seen_once(
    run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head trained on cached features is the head trained on images, and the encoder sees each image once."""
    batched = run("slf", augment="none", output="a")
    seen: list[int] = []
    original = extract_features

    def extract(encoder: torch.nn.Module, *args: Any, **options: Any) -> Tensor:
        encoder.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
        return original(encoder, *args, **options)

    monkeypatch.setattr(module, "extract_features", extract)
    cached = run("slf", augment="none", output="b")
    assert sum(seen) == 80
    for key, value in weights(cached).items():
        assert torch.equal(value, weights(batched)[key])

    monkeypatch.setattr(Settings, "caches", property(lambda self: False))
    slow = run("slf", augment="none", output="c")
    for key, value in weights(slow).items():
        torch.testing.assert_close(weights(cached)[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        slow("slf", {"augment": "none"}),
        slow("alf", {"ema_decay": 0.9}),
        ("aff", {"branches": ("clean", "adv"), "val_fraction": 0.25, "ema_decay": 0.5}),
        slow("sff", {"accumulate": 2, "keep_head": True}),
    ],
)
def test_stopped_anywhere_it_ends_with_the_same_weights(
    run: Callable[..., Finetuned], tmp_path: Path, protocol: str, options: dict[str, Any]
) -> None:
    if options.get("keep_head"):
        options["model"] = run("slf", output="head").folder
    options["batch_size"] = 30
    whole = run(protocol, output="whole", **options)
    starts = 0
    while not (pieces := run(protocol, output="pieces", time_budget=0, **options)).finished:
        starts += 1
        assert pieces.record == {} and (pieces.output / FILE).is_file() and not pieces.folder.exists()
    assert starts == whole.record["step"] - 1 == 3
    assert same(weights(whole), weights(pieces)) == weights(whole).keys()
    for key in ("settings", "encoder", "data", "epoch", "figures", "step"):
        assert whole.record[key] == pieces.record[key]
    kept = [[{k: v for k, v in r.items() if k.startswith("val_")} for r in read_log(t.output)] for t in (whole, pieces)]
    assert [r for r in kept[0] if r] == [r for r in kept[1] if r]


@pytest.mark.parametrize(("channels", "expected"), [([8, 8, 16], False), ([16, 16, 16], True)])
def test_channels_last_where_it_corrupts_no_memory(
    run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels: list[int], expected: bool
) -> None:
    """Channels-last, the narrow network would end a process of two threads: see `safe_channels_last`."""
    layouts: set[bool] = set()
    original = module.Finetuner.train_step

    def train_step(trainer: module.Finetuner, images: Tensor, labels: Tensor | None) -> None:
        layouts.add(channels_last(trainer.model))
        assert images.is_contiguous()  # convolutions would follow them
        original(trainer, images, labels)

    monkeypatch.setattr(module.Finetuner, "train_step", train_step)
    encoder = export_encoder(tmp_path / "encoder", channels=channels)
    assert run("sff", model=encoder, epochs=1).finished
    assert layouts == {expected}


def test_a_finished_run_costs_nothing_and_another_is_refused(
    run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("slf")
    monkeypatch.setattr(module, "Finetuner", None)
    again = run("slf")
    assert again.finished and again.record == first.record
    with pytest.raises(
        ValueError, match=r"holds a run of something else.*or give its settings:\n  protocol: 'slf' there, 'alf' now"
    ):
        run("alf")


def test_an_unfinished_run_of_something_else_is_refused(run: Callable[..., Finetuned]) -> None:
    run("aff", time_budget=0)
    with pytest.raises(
        ValueError, match=r"(?s)unfinished run of something else.*\n  data.sha256.*\n  settings.seed: 0 there, 1 now"
    ):
        run("aff", seed=1, shots=7)


def test_a_folder_of_something_else_is_not_replaced(run: Callable[..., Finetuned], tmp_path: Path) -> None:
    (tmp_path / "run" / "classifier").mkdir(parents=True)
    (tmp_path / "run" / "classifier" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="exists and is not an earlier export"):
        run("slf")
    assert (tmp_path / "run" / "classifier" / "thesis.tex").read_text(encoding="utf-8") == "years of work"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["classifier"], "said before any training"


@pytest.mark.parametrize("protocol", ["slf", "aff"])
def test_the_best_epoch_on_held_out_images_is_exported(
    run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """By accuracy under attack if training attacks, else by clean accuracy; here the second of three epochs."""
    states: list[dict[str, Tensor]] = []

    def robustness(model: torch.nn.Module, images: ImageData, steps: int, **options: Any) -> Robustness:
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        assert len(images) == 20 and steps == (20 if protocol == "aff" else 0)
        scores = (0.3, 0.6, 0.5), (0.6, 0.3, 0.3)
        standard, robust = scores if protocol == "slf" else reversed(scores)
        return Robustness(standard[len(states) - 1], robust[len(states) - 1], len(images), 0.1, 0.1, steps, 0)

    drawn: list[float] = []
    monkeypatch.setattr(module, "robustness", robustness)
    monkeypatch.setattr(loop, "_DRAW_EVERY", math.inf)
    monkeypatch.setattr(loop, "save_curves", lambda folder, panels: drawn.append(read_log(folder)[-1]["val_standard"]))
    tuned = run(protocol, epochs=3, val_fraction=0.25)
    assert tuned.record["epoch"] == 2 and tuned.record["chosen"] == "the best epoch on held-out images"
    assert tuned.record["data"]["held_out"] == 20 and tuned.record["data"]["images"] == 60
    assert same(weights(tuned), states[1]) == states[1].keys() and same(states[1], states[2]) != states[1].keys()
    assert drawn == [0.5 if protocol == "slf" else 0.3], "once, with the last judgement"


def test_the_averaged_weights_are_exported(run: Callable[..., Finetuned]) -> None:
    plain, averaged = run("sff", output="a"), run("sff", output="b", ema_decay=0.9)
    a, b = weights(plain), weights(averaged)
    assert not torch.allclose(a["fc.weight"], b["fc.weight"], rtol=0.05)
    assert b["fc.weight"].norm() < a["fc.weight"].norm(), "it lags behind weights that grow from zero"


@pytest.mark.parametrize("protocol", ["alf", "aff"])
def test_accumulated_parts_give_the_step_of_the_whole(run: Callable[..., Finetuned], vit: Path, protocol: str) -> None:
    """Exactly where there are no batch statistics."""
    whole = run(protocol, model=vit, output="a", epochs=1)
    parts = run(protocol, model=vit, output="b", epochs=1, accumulate=4)
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[key], value, rtol=1e-3, atol=2e-5)


def test_few_shot_is_balanced_seeded_and_nested(run: Callable[..., Finetuned]) -> None:
    data = load_data("digits", "train", size=16)
    few = {(shots, seed): few_shot(data, shots, seed) for shots, seed in [(3, 0), (3, 1), (5, 0)]}
    assert few[3, 0].labels.bincount().tolist() == [3] * 10 and few[5, 0].labels.bincount().tolist() == [5] * 10
    assert few[3, 0].indices.tolist() == sorted(few[3, 0].indices.tolist()) != few[3, 1].indices.tolist()
    assert set(few[3, 0].indices.tolist()) < set(few[5, 0].indices.tolist())
    assert few[3, 0].indices.tolist()[:6] == few_shot(data, 3).indices.tolist()[:6]
    with pytest.raises(ValueError, match="200 images of every class were asked for, digits has 142 of 0"):
        few_shot(data, 200)
    with pytest.raises(ValueError, match="shots is 0"):
        few_shot(data, 0)
    tuned = run("slf", data, shots=3)
    assert tuned.record["data"]["images"] == 30 and tuned.record["data"]["of"] == len(data)
    assert tuned.record["data"]["sha256"] == few[3, 0].fingerprint()


def test_a_head_can_be_kept(run: Callable[..., Finetuned]) -> None:
    linear = run("slf", output="linear")
    full = run("aff", model=linear.folder, output="full", keep_head=True, lr=1e-9)
    assert full.record["kept_head"] is True
    torch.testing.assert_close(weights(full)["fc.weight"], weights(linear)["fc.weight"], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"The head of resnet8_cifar tells 10 classes \(0, 1, .* apart, mine has 3 \(0, 1, 2"):
        run("aff", relabelled(lambda y: y % 3, 3), model=linear.folder, output="other", keep_head=True)
    with pytest.raises(ValueError, match=r"tells 0 classes apart"):
        run("aff", output="other", keep_head=True)


def test_random_weights_are_those_of_the_seed(run: Callable[..., Finetuned], resnet: Path) -> None:
    name = f"random:{resnet}"
    one, same_again, other = (run("slf", model=name, output=str(i), seed=seed) for i, seed in enumerate([0, 0, 1]))
    assert one.record["encoder"]["name"] == f"random:{'/'.join(resnet.parts[-2:])}"
    assert one.record["encoder"] == same_again.record["encoder"] != other.record["encoder"]
    encoder = load_folder(resnet).state_dict()
    assert not torch.equal(weights(one)["conv1.weight"], encoder["conv1.weight"])
    assert weights(one)["conv1.weight"].shape == encoder["conv1.weight"].shape
    registered = run("slf", model="random:resnet8_cifar", output="registered", shots=2)
    assert registered.record["encoder"]["name"] == "random:resnet8_cifar" and registered.record["data"]["shape"] == [3, 32, 32]


def test_random_weights_of_a_tag_need_none_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advcl_hub.finetuning.encoder.load_model", None)  # which would download them
    assert open_encoder("random:resnet18.a1_in1k").facts["architecture"] == "resnet18"


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_another_size_than_the_encoders_own(run: Callable[..., Finetuned], request: Any, kind: str) -> None:
    encoder = request.getfixturevalue(kind)
    tuned = run("aff", "digits", model=encoder, size=24, shots=4, epochs=1)
    assert tuned.record["data"]["shape"] == [3, 24, 24] and tuned.load().pretrained_cfg["input_size"] == (3, 24, 24)
    with torch.no_grad():
        assert tuned.load()(torch.rand(2, 3, 24, 24)).shape == (2, 10)
    config = json.loads((tuned.folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_args"].get("img_size", 24) in (24, [24, 24])


def test_own_images_in_folders(run: Callable[..., Finetuned], pets: Path) -> None:
    tuned = run("slf", f"folder:{pets}", batch_size=4)
    assert tuned.record["data"]["classes"] == ["cat", "dog"] and tuned.record["data"]["name"] == "folder:pets"
    assert json.loads((tuned.folder / "config.json").read_text(encoding="utf-8"))["label_names"] == ["cat", "dog"]


def test_few_steps_are_warned_of(run: Callable[..., Finetuned], resnet: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"80 images in batches of 10 are 8 steps in 1 epoch, few for a learning rate of 0.1"):
        tuned = advcl_hub.finetune(resnet, "fake:80", "slf", epochs=1, lr=0.1, output=tmp_path / "run")
    assert tuned.record["settings"]["batch_size"] == 10


def test_options_without_effect_are_said_and_left_out(run: Callable[..., Finetuned]) -> None:
    with pytest.warns(UserWarning, match="Without effect in slf, and left out: steps, eps."):
        tuned = run("slf", eps=0.5, epochs=1)
    assert tuned.record["settings"]["eps"] == 8 / 255


def test_losses_that_are_not_finite_stop_with_the_last_good_checkpoint(run: Callable[..., Finetuned]) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+: stopped.*checkpoint.safetensors; lower lr"):
        run("sff", lr=1e20, epochs=3)


def test_the_folder_of_a_run_tells_every_setting() -> None:
    overrides = {"branches": ("clean", "adv"), "milestones": (1.5, 2), "lr": 1 / 3}
    found = default_output("runs/mine/export", "folder:pets", "aff", "acl", "val", 24, 5, True, "sorted", overrides)
    said = "folder-pets-val-aff-acl-size24-5shot-keep-head-order-sorted-branchesclean-adv-milestones1.5-2-lr0.3333"
    assert found == Path("runs", "finetuned", "mine-export", said)


def test_a_run_that_goes_on_elsewhere_says_so_and_records_both_places(
    run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "Note: other hardware or versions than before; not bit by bit as one run."
    options: dict[str, Any] = {"epochs": 1, "batch_size": 40}
    assert not run("slf", time_budget=0, **options).finished
    assert note not in capsys.readouterr().err
    monkeypatch.setattr("advcl_hub.finetuning.runner.versions", lambda: {"torch": "of another machine"})
    places = run("slf", **options).record["places"]
    assert note in capsys.readouterr().err and len(places) == 2
    assert places[0]["versions"]["torch"] == torch.__version__ and places[1]["versions"] == {"torch": "of another machine"}
