from pathlib import Path

import pytest
import torch

from advcl_hub.data import ImageData
from train.cluster_report import cluster_stats, draw_report, format_stats, purity

pytestmark = pytest.mark.usefixtures("rendered")


def test_purity_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (300,), generator=generator) * 2  # odd clusters are empty
    classes = torch.randint(0, 4, (300,), generator=generator)
    right = 0
    for cluster in labels.unique().tolist():
        members = classes[labels == cluster].tolist()
        right += max(members.count(c) for c in range(4))
    assert purity(labels, classes) == right / 300


@pytest.mark.parametrize(("labels", "classes"), [([], []), ([0, 1], [0]), ([0, -1], [0, 1]), ([0, 1], [0, -1]), ([[0]], [[0]])])
def test_purity_refuses(labels: list[int], classes: list[int]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        purity(torch.tensor(labels).long(), torch.tensor(classes).long())


def test_table_shows_sizes_and_empty_clusters() -> None:
    labels = torch.tensor([[0], [0], [0], [2], [2], [3]])
    (one,) = cluster_stats(labels, (5,), torch.tensor([0, 0, 1, 1, 1, -1]))
    assert one.sizes.tolist() == [0, 0, 1, 2, 3]
    assert one.purity == pytest.approx(4 / 5)  # the image without a class does not count
    assert format_stats([one]).splitlines()[1].split() == ["5", "0.800", f"{one.nmi:.3f}", "1", "2", "3", "2"]
    (unknown,) = cluster_stats(labels, (5,), torch.full((6,), -1))
    assert "nan" in format_stats([unknown])


def test_report_can_be_drawn_with_one_channel_empty_clusters_and_no_classes(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    grey = ImageData(images, torch.full((60,), -1), torch.arange(60), (), "grey")
    labels = torch.arange(60)[:, None] % 2 * 2  # cluster 1 is empty
    draw_report(labels, (4,), grey, tmp_path / "report.png", "pixels")
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
