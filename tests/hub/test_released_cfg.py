"""What timm is told of released weights."""

from pathlib import Path

from timm.models import PretrainedCfg

from advcl_hub.hub.released import SOURCES, Release

STORED = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "crop_pct": 0.9}
ELSEWHERE = {**dict.fromkeys(SOURCES, "elsewhere"), "custom_load": True}


def release(folder: Path | None = None) -> Release:
    config = {"architecture": "resnet8_cifar", "num_classes": 2, "label_names": ["cat", "dog"]}
    return Release("resnet8_cifar.x", config | {"pretrained_cfg": STORED | ELSEWHERE}, folder=folder)


def test_images_are_normalised_and_cropped_as_in_training() -> None:
    cfg = release().cfg
    assert {name: getattr(cfg, name) for name in STORED} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in STORED.items()
    }
    told = {"architecture": "resnet8_cifar", "tag": "x", "num_classes": 2, "label_names": ("cat", "dog")}
    assert {name: getattr(cfg, name) for name in told} == told


def test_weights_come_from_nowhere_but_the_release(tmp_path: Path) -> None:
    cfg, usual = release(tmp_path).cfg, PretrainedCfg()
    assert cfg.file == str(tmp_path / "model.safetensors")
    others = {name: getattr(cfg, name) for name in ELSEWHERE if name != "file"}
    assert others == {name: getattr(usual, name) for name in others}
