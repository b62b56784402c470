"""Adversarial training on pseudo-labels in float64 against its equations, written plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.pretraining import PseudoLabelAT
from tests.support.reference_steps import N, check_same_step, make_encoder, plain_attack, weak_images

KS = (2, 3, 5)


def make_labels() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randint(k, (N,), generator=generator) for k in KS], 1)


def test_a_step_is_pgd_training_on_all_clusterings() -> None:
    """The loss, adversarial images, gradients of all parameters, running statistics."""
    torch.manual_seed(0)
    network, images, labels = PseudoLabelAT(make_encoder(), ks=KS).double(), weak_images(), make_labels()
    encoder = network.plain_encoder()
    heads = [nn.Linear(12, k).double() for k in KS]
    for head, k in zip(heads, KS, strict=True):
        head.load_state_dict(network.heads[str(k)].state_dict())

    def loss(x: Tensor) -> Tensor:
        """Summed over the images, averaged over the clusterings."""
        features = encoder(x)
        terms = [-F.log_softmax(head(features), 1)[range(N), labels[:, i]].sum() for i, head in enumerate(heads)]
        return sum(terms, torch.zeros(())) / len(heads)

    def reference() -> tuple[Tensor, ...]:
        encoder.eval()
        adversarial = plain_attack(loss, images, network.attack)
        encoder.train()
        return loss(adversarial) / N, adversarial

    others = {f"heads.{k}.{name}": p for k, head in zip(KS, heads, strict=True) for name, p in head.named_parameters()}
    check_same_step(network, encoder, images, reference, labels, others)


def test_the_attack_is_two_steps_by_default_and_heads_learn_only_after_it() -> None:
    network = PseudoLabelAT(make_encoder().float(), ks=KS)
    assert (network.attack.steps, network.attack.step_size, network.attack.eps) == (2, 5 / 255, 8 / 255)
    network(torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8), make_labels()).total.backward()
    assert all(p.requires_grad and p.grad is not None for p in network.heads.parameters())


@pytest.mark.parametrize("labels", [None, torch.zeros(N, 2, dtype=torch.int64), torch.zeros(N, 3)])
def test_labels_that_do_not_fit(labels: Tensor | None) -> None:
    network = PseudoLabelAT(make_encoder(), ks=KS)
    with pytest.raises(ValueError, match=r"labels are torch|pass the labels of the batch"):
        network(torch.zeros(N, 3, 8, 8, dtype=torch.uint8), labels)
