"""From a name to what is finetuned, where an architecture is not what most are."""

from pathlib import Path

import pytest
from timm.models import register_model

from advcl_hub.finetuning.encoder import open_encoder, set_head
from advcl_hub.finetuning.presets import choose_settings
from tests.support.tiny_classifiers import TinyNet, labelled_by


@pytest.mark.parametrize("kind", ["", "random:"])
def test_a_size_that_the_architecture_does_not_take_is_named(vit: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind}{vit} cannot be opened for images of 3x3: ."):
        open_encoder(f"{kind}{vit}", size=3)  # smaller than a patch


def test_a_model_without_a_classifier_to_replace_is_refused() -> None:
    model = TinyNet()
    with pytest.raises(ValueError, match=r"^TinyNet has no classifier to replace \(no reset_classifier\): it is no timm image"):
        set_head(model, labelled_by(model, 10), choose_settings("aff", "advcl", overrides={}))


def test_an_architecture_that_says_nothing_of_its_weights_starts_from_random_ones() -> None:
    @register_model
    def plain_net(pretrained: bool = False, pretrained_cfg: object = None, **arguments: object) -> TinyNet:
        return TinyNet()

    opened = open_encoder("random:plain_net", size=8)
    assert isinstance(opened.model, TinyNet) and opened.facts["name"] == "random:plain_net"
