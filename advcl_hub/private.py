"""timm's private parts that this package uses, each in a function of its own; no other module touches any.

timm may move or change them in any version. What is imported is checked before it is used; if it has changed, an ImportError
says so in one sentence. Importing this module never fails. `tests/test_private.py` has a test for each part.
Of huggingface_hub nothing private is used.
"""

import importlib
import inspect
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import timm
from timm.models import DefaultCfg, PretrainedCfg
from torch import nn


def _find(module: str, name: str, purpose: str, is_known: Callable[[Any], object]) -> Any:
    """Returns a private part of timm.

    Args:
        module, name: where timm has it.
        purpose: what needs it, the first words of the message.
        is_known: whether a part is as we know it; it may raise anything at one that is not.

    Raises:
        ImportError: timm has no such part, or another one; the message names the part and the version, and says what to do.
    """
    try:
        found = getattr(importlib.import_module(module), name)
        change = "has changed"
    except (ImportError, AttributeError):
        found, change = None, "no longer has"
    try:
        if found is not None and is_known(found):
            return found
    except Exception:  # whatever an unknown part does
        pass
    raise ImportError(
        f"{purpose} needs {module}.{name}, which timm {timm.__version__} {change}: update advcl-hub or install an earlier timm."
    )


# -------------------------------------------------------------------------------------------- names of weights


class RegistryEntry:
    """An architecture in timm's registry, to which tags can be added; timm has no public way.

    Everything is checked when it is made, so that no change stops halfway.

    Args:
        architecture: known to timm, with a cfg of its own.

    Raises:
        ImportError: timm's registry is not as we know it.
    """

    def __init__(self, architecture: str) -> None:
        cfgs = timm.models.get_arch_pretrained_cfgs(architecture)  # by name, with the tag
        names = {architecture, *cfgs}

        def part(name: str, is_known: Callable[[Any], object]) -> Any:
            return _find("timm.models._registry", name, "A name for weights in timm", is_known)

        self.architecture = architecture
        self._entrypoints: dict[str, Callable[..., Any]] = part(
            "_model_entrypoints", lambda it: isinstance(it, dict) and it[architecture] is timm.model_entrypoint(architecture)
        )
        self._has_pretrained: set[str] = part("_model_has_pretrained", lambda it: isinstance(it, set) and _is_read(it))
        self._pretrained_cfgs: dict[str, PretrainedCfg] = part(
            "_model_pretrained_cfgs",
            lambda it: isinstance(it, dict) and all(it[name] == timm.models.get_pretrained_cfg(name) for name in names),
        )
        self._with_tags: list[str] = part(
            "_model_with_tags", lambda it: isinstance(it[architecture], list) and {*it[architecture]} == {*cfgs}
        )[architecture]
        self._default_cfg: DefaultCfg = part("_model_default_cfgs", lambda it: _is_default_cfg(it[architecture]))[architecture]

    def replace_entrypoint(self, function: Callable[..., Any]) -> None:
        """Makes `function` what timm calls to build the architecture, what is imported by its name, and what pickle finds."""
        original = self._entrypoints[self.architecture]
        self._entrypoints[self.architecture] = function
        module = original.__module__
        for name in (module, module.rpartition(".")[0]):
            if getattr(sys.modules.get(name), self.architecture, None) is original:
                setattr(sys.modules[name], self.architecture, function)

    def add_tag(self, tag: str, cfg: PretrainedCfg) -> None:
        """Adds weights to the architecture, as `timm.models.register_model` does, or replaces those with this tag."""
        name = f"{self.architecture}.{tag}"
        if tag not in self._default_cfg.tags:
            self._default_cfg.tags.append(tag)
            self._with_tags.append(name)
        self._default_cfg.cfgs[tag], self._default_cfg.is_pretrained = cfg, True
        self._pretrained_cfgs[name] = cfg
        self._has_pretrained.add(name)

    def mark_pretrained(self, name: str) -> None:
        """Makes `timm.is_model_pretrained` say that `name` has weights."""
        self._has_pretrained.add(name)


def _is_read(names: set[str]) -> bool:
    """Whether timm takes the names in this very set for those with weights: it may have none of an architecture to compare."""
    names.add("a name that nobody else has")
    try:
        return timm.models.is_model_pretrained("a name that nobody else has")
    finally:
        names.discard("a name that nobody else has")


def _is_default_cfg(cfg: Any) -> bool:
    return isinstance(cfg, DefaultCfg) and isinstance(cfg.tags, deque) and {*cfg.tags} == cfg.cfgs.keys()


# ---------------------------------------------------------------------------------------------- models and exports


def set_model_args(model: nn.Module, model_args: Mapping[str, Any]) -> None:
    """Sets the arguments of the architecture that timm saves with a model."""
    model._model_args = dict(model_args)  # type: ignore[assignment]


def config_writer() -> Callable[..., None]:
    """Returns timm's `save_config_for_hf(model, path, *, model_config, model_args)`, which writes config.json.

    The public `save_for_hf` writes weights as well, always in the model's own dtype.

    Raises:
        ImportError: timm has no such function any more, or it takes other arguments.
    """
    found: Callable[..., None] = _find(
        "timm.models._hub",
        "save_config_for_hf",
        "An export",
        lambda it: inspect.signature(it).bind(nn.Identity(), Path(), model_config={}, model_args={}),
    )
    return found


def _feature_take_indices() -> Callable[..., tuple[list[int], int]]:
    """Returns timm's `feature_take_indices(count, indices)`, or, where timm has none, what raises ImportError when called."""
    try:
        found: Callable[..., tuple[list[int], int]] = _find(
            "timm.models._features",
            "feature_take_indices",
            "The choice of intermediate features",
            lambda it: it(3, [0, -1]) == ([0, 2], 2) and it(3, 2) == ([1, 2], 2) and it(3, None) == ([0, 1, 2], 2),
        )
        return found
    except ImportError as error:
        message = str(error)

    def refuse(*args: Any) -> NoReturn:
        raise ImportError(message)

    return refuse


# Looked up once: torch.compile has to see timm's own function in a forward pass.
feature_take_indices = _feature_take_indices()
