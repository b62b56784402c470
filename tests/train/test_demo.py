"""The demo at a tiny setting, as `make demo` runs it."""

import json
import re
from pathlib import Path

import pytest
import timm

from advcl_hub.evaluation import Protocol, evaluate
from advcl_hub.training.stop import StopRequest
from tests.support import warm
from train.demo import RELEASED, run_demo

TINY = ("epochs=1", "optimizer.warmup_epochs=0", "judge.every=0", "attack.steps=1", "model_kwargs.channels=[16,16,16]")


def demo(output: Path) -> str:
    done = warm.run("-m", "train.demo", *TINY, f"pseudo_labels.cache={output / 'labels'}", "--output", output, code=0)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_demo_from_digits_to_a_robustness_table(tmp_path: Path) -> None:
    said = demo(tmp_path)
    look, training = said.split("== SimCLR: pretraining")
    assert "100 test digits; robust: PGD-20, l_inf, eps 8/255" in look and (tmp_path / "first_look.png").stat().st_size > 0
    assert "epoch" not in look and "epoch" in training
    (plain, robust) = (re.search(rf"{re.escape(name)} +([\d.]+)% +([\d.]+)%", look) for name in RELEASED.values())
    assert plain is not None and robust is not None
    assert float(plain[1]) > 90 and float(robust[1]) > 90
    assert float(plain[2]) < 10 and float(robust[2]) > 60
    assert "359 test digits; robust: PGD-20, l_inf, eps 16/255" in said
    assert "reloaded through timm, its outputs are equal" in said
    for name in ("adversarial_examples.png", "advcl/views.png", "simclr/curves.png", "classifier/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0, name
    model = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True)
    assert model.num_classes == 10
    figures = json.loads((tmp_path / "classifier" / "results.json").read_text(encoding="utf-8"))["figures"]["test"]
    assert figures["images"] == 359 and 0 <= figures["robust"] <= figures["standard"] <= 1

    again = demo(tmp_path)
    assert again.count("is finished already") == 2 and "attacked before: " in again
    assert look.partition("linear head on")[2].partition("Picture")[0] in again, "the same table"
    result = evaluate(tmp_path / "classifier", "digits", Protocol(eps=16 / 255, check_images=0))
    assert (result.standard, result.robust) == (figures["standard"], figures["robust"])


def test_a_mistyped_key_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'attack\.steps'"):
        run_demo(tmp_path / "demo", ["attack.step=1"], StopRequest())
    assert not (tmp_path / "demo").exists()
