"""What several attacks make together: each takes the images that are right when clean, and the worst case counts them all."""

from typing import Any

import pytest

from advcl_hub.evaluation import autoattack
from tests.support.clear_net import ClearNet, measured


def test_an_image_that_pgd_alone_breaks_is_broken_in_the_worst_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(measurement: Any, positions: list[int], unable: Any) -> dict[str, dict[str, list[Any]]]:
        """An attack that breaks the first image that is right, and no other."""
        survives = [place > 0 for place in range(len(positions))]
        return {"square": {"position": positions, "survives": survives, "prediction": [0] * len(positions)}}

    monkeypatch.setattr(autoattack, "left_out", lambda *given: {})
    monkeypatch.setattr(autoattack, "run", run)
    found = measured(ClearNet(), autoattack="standard", check_images=0)
    columns = [found.images[name] for name in ("standard", "pgd", "autoattack")]
    assert found.images["worst_case"] == [all(flags) for flags in zip(*columns, strict=True)]
    assert found.worst_case < found.autoattack == found.standard - 1 / 30
