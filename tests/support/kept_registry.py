"""timm's registry and ours, as they were."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from timm.models import DefaultCfg
from timm.models import _registry as timm_registry

from advcl_hub.hub import registry

_STORES = (  # timm's; one that it renames has to be named here, or the next test finds what this one registered
    *("_model_entrypoints", "_model_with_tags", "_model_default_cfgs", "_model_has_pretrained", "_model_pretrained_cfgs"),
    *("_module_to_models", "_model_to_module"),
)


def _copied(store: Any) -> Any:
    """A copy as deep as what registering changes; a whole one takes half a second."""
    if isinstance(store, DefaultCfg):
        return replace(store, tags=store.tags.copy(), cfgs=dict(store.cfgs))
    if isinstance(store, dict):
        return {name: _copied(value) for name, value in store.items()}
    return copy.copy(store)


@contextmanager
def kept_registry() -> Iterator[None]:
    """What is registered inside is gone afterwards: the next test must not find its names."""
    kept = {name: getattr(timm_registry, name) for name in _STORES}
    saved = {name: _copied(value) for name, value in kept.items() if name != "_model_entrypoints"}
    entry_points, releases = dict(timm_registry._model_entrypoints), dict(registry._releases)
    tags = {architecture: dict(found) for architecture, found in registry._tags.items()}
    try:
        yield
    finally:
        for name, wrapper in timm_registry._model_entrypoints.items():
            original = entry_points.get(name, wrapper)
            for module in (original.__module__, original.__module__.rpartition(".")[0]):
                if getattr(sys.modules.get(module), name, None) is wrapper:
                    setattr(sys.modules[module], name, original)
        for name, value in saved.items():
            kept[name].clear()
            kept[name].update(value)
        for store, value in ((timm_registry._model_entrypoints, entry_points), (registry._releases, releases)):
            store.clear()
            store.update(value)
        for architecture in list(registry._tags):  # the entry points hold the inner dictionaries
            found = registry._tags[architecture] if architecture in tags else registry._tags.pop(architecture)
            found.clear()
            found.update(tags.get(architecture, {}))
