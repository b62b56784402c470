"""pytest plug-in that points timm's own test_models.py at our architectures and released weights, and at nothing else.

ADVCL_TEST_TAGS names further weights, NAME=SOURCE NAME=SOURCE ..., as `advcl_hub.register` takes them.

Loaded with `-p timm_suite_plugin`, so before timm's test module, whose parametrisations call `list_models`.
"""

import os
from typing import Any

import pytest
import timm
from timm.models import get_arch_name, model_entrypoint

import advcl_hub
import advcl_hub.models as models

for pair in os.environ.get("ADVCL_TEST_TAGS", "").split():
    advcl_hub.register(*pair.split("=", 1))
TAGS = set(advcl_hub.releases())
OURS = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(models.__name__)}

list_all_models = timm.list_models


def list_our_models(filter: str = "", module: Any = "", **kwargs: Any) -> list[str]:
    """`timm.list_models` over our architectures and weights.

    `module` is left out: timm's tests choose families with `forward_intermediates` by it, and ours have it.
    """
    return [name for name in list_all_models(filter, **kwargs) if name in TAGS or get_arch_name(name) in OURS]


def pytest_configure() -> None:
    pytest.MonkeyPatch().setattr(timm, "list_models", list_our_models)  # until this process ends


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops the tests on architectures that timm's suite names itself."""

    def is_ours(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        model_name = str(callspec.params.get("model_name")) if callspec else ""
        return model_name in TAGS or get_arch_name(model_name) in OURS

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
