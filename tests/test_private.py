"""Private parts of timm: each is what we take it for, and `import advcl_hub` survives without it."""

import ast
import copy
import functools
import json
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import torch

from tests.support import ROOT
from tests.support.warm import in_new_process

# advcl_hub is imported inside functions: the processes of `in_new_process` import this module, and then prepare timm for it.

RELEASED = "resnet10_cifar.pseudo_label_at_c10"
RECORDS = json.loads((ROOT / "advcl_hub" / "hub" / "released.json").read_text(encoding="utf-8"))["releases"]
NAMES = {*RECORDS, *(record["robustbench"] for record in RECORDS.values() if "robustbench" in record)}
STORES = ("_model_entrypoints", "_model_has_pretrained", "_model_pretrained_cfgs", "_model_with_tags", "_model_default_cfgs")


# ---------------------------------------------------------------------------------------- what we take each part for


def add_a_tag() -> dict[str, Any]:
    """In a new process: adds a tag to an architecture, and asks timm's public functions."""
    import advcl_hub.models
    from advcl_hub.private import RegistryEntry

    entry, name = RegistryEntry("resnet20_cifar"), "resnet20_cifar.test"
    original = timm.model_entrypoint("resnet20_cifar")
    cfg = timm.models.PretrainedCfg(architecture="resnet20_cifar", tag="test", file="/a/file", input_size=(3, 16, 16))
    entry.add_tag("test", cfg)
    found: dict[str, Any] = {
        "_model_with_tags": list(timm.models.get_arch_pretrained_cfgs(name)) == ["resnet20_cifar", name],
        "_model_has_pretrained": timm.models.is_model_pretrained(name) and timm.list_pretrained("resnet20_cifar*") == [name],
        "_model_pretrained_cfgs": timm.models.get_pretrained_cfg(name) == cfg,
        "bare": timm.models.is_model_pretrained("resnet20_cifar"),
    }
    entry.mark_pretrained("resnet20_cifar")
    found["marked"] = timm.list_pretrained("resnet20_cifar*") == ["resnet20_cifar", name]

    def replaced(**options: Any) -> Any:
        return original(**options)

    entry.replace_entrypoint(replaced)
    imported = (advcl_hub.models.resnet20_cifar, sys.modules["advcl_hub.models.resnet_cifar"].resnet20_cifar)  # type: ignore[attr-defined]
    found["_model_entrypoints"] = timm.model_entrypoint(name) is replaced and all(here is replaced for here in imported)
    with warnings.catch_warnings(action="ignore"):  # timm says that it overwrites the architecture
        timm.models.register_model(original)
    found["_model_default_cfgs"] = timm.models.get_pretrained_cfg(name) == cfg  # which came from the architecture's own cfgs
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return in_new_process(add_a_tag)


@pytest.mark.parametrize("part", STORES)
def test_timm_knows_what_we_write_to_its_registry(part: str, known: dict[str, Any]) -> None:
    assert known[part]


def test_an_architecture_has_weights_once_it_is_marked(known: dict[str, Any]) -> None:
    assert known["marked"] and not known["bare"]


def test_what_has_the_name_of_an_architecture_and_is_none_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that an architecture's module is in may mean something else by that name."""
    import advcl_hub.models
    from advcl_hub.private import RegistryEntry
    from tests.support.kept_registry import kept_registry

    module, mine = sys.modules["advcl_hub.models.resnet_cifar"], object()
    monkeypatch.setattr(advcl_hub.models, "resnet20_cifar", mine)
    with kept_registry():
        entry, function = RegistryEntry("resnet20_cifar"), functools.partial(timm.model_entrypoint("resnet20_cifar"))
        entry.replace_entrypoint(function)
        assert timm.model_entrypoint("resnet20_cifar") is function
        assert vars(module)["resnet20_cifar"] is function and vars(advcl_hub.models)["resnet20_cifar"] is mine


def test_timm_saves_the_arguments_that_we_set(tmp_path: Path) -> None:
    from advcl_hub.private import set_model_args

    model = timm.create_model("resnet18", num_classes=0)
    set_model_args(model, {"output_stride": 16})
    assert timm.models.get_model_args(model)["output_stride"] == 16
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_args"]["output_stride"] == 16


def test_the_config_is_that_of_timms_public_function(tmp_path: Path) -> None:
    from advcl_hub.private import config_writer

    model = timm.create_model("resnet18", num_classes=2, output_stride=16)
    options: dict[str, Any] = {"model_config": {"label_names": ["cat", "dog"]}, "model_args": {"output_stride": 16}}
    config_writer()(model, tmp_path / "ours.json", **options)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True, **options)
    ours, theirs = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("ours.json", "config.json"))
    assert ours == theirs and ours["label_names"] == ["cat", "dog"] and ours["model_args"]["output_stride"] == 16


@pytest.mark.parametrize("indices", [None, 2, [0, -1], [-2]])
def test_indices_are_those_of_timms_own_networks(indices: int | list[int] | None) -> None:
    from advcl_hub.private import feature_take_indices

    model, images = timm.create_model("resnet18").eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        every, chosen = (model.forward_intermediates(images, which, intermediates_only=True) for which in (None, indices))
    taken, last = feature_take_indices(len(every), indices)
    assert [tuple(one.shape) for one in chosen] == [tuple(every[index].shape) for index in taken] and last == max(taken)


# --------------------------------------------------------------------------------------- a timm that has changed


def as_list(store: Any) -> list[Any]:
    return list(store)


def emptied(store: Any) -> Any:
    """What an old name holds once timm reads another."""
    return type(store)()


def with_sets(store: Any) -> dict[str, Any]:
    return {name: set(value) if isinstance(value, list) else vars(value) for name, value in store.items()}


CHANGED = {
    **{f"no {name}": (name, None) for name in STORES},
    **{f"{name} is a list": (name, as_list) for name in STORES},
    **{f"{name} is not used": (name, emptied) for name in STORES},
    **{f"{name} is a copy": (name, copy.deepcopy) for name in STORES},
    "_model_with_tags has sets": ("_model_with_tags", with_sets),
    "_model_default_cfgs has dictionaries": ("_model_default_cfgs", with_sets),
}


def hide(module: str, name: str, change: Callable[[Any], Any] | None) -> Any:
    """Hides a part of timm, or shows another in its place; timm itself goes on with the real module, which is returned."""
    real = sys.modules[f"timm.models.{module}"]
    shown = types.ModuleType(real.__name__)
    vars(shown).update(vars(real))
    if change is None:
        delattr(shown, name)
    else:
        setattr(shown, name, change(getattr(real, name)))
    sys.modules[real.__name__] = shown
    setattr(timm.models, module, shown)
    return real


def import_warnings() -> list[str]:
    """Imports advcl_hub for the first time and returns what it warns of."""
    assert "advcl_hub" not in sys.modules
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import advcl_hub  # noqa: F401
    return [f"{warning.category.__name__}: {warning.message}" for warning in caught]


def import_with_another_registry(case: str, folder: Path) -> dict[str, Any]:
    """In a new process: what works although timm's registry has changed."""
    registry = hide("_registry", *CHANGED[case])
    found: dict[str, Any] = {"warnings": import_warnings()}
    import advcl_hub

    found["classes"] = timm.create_model("resnet10_cifar").num_classes
    found["listed"] = timm.list_pretrained("resnet10_cifar*")
    stores = [getattr(registry, store) for store in STORES]
    found["half"] = [name for store in stores for name in store if name in NAMES]
    found["default"] = list(stores[-1]["resnet10_cifar"].tags)
    found["entry point"] = registry._model_entrypoints["resnet10_cifar"] is advcl_hub.models.resnet10_cifar
    advcl_hub.pull(RELEASED, folder / "pulled")
    found["classes of a folder"] = timm.create_model(f"local-dir:{folder / 'pulled'}", pretrained=True).num_classes
    try:
        advcl_hub.register("resnet10_cifar.mine", folder / "pulled")
    except ImportError as error:
        found["refusal"] = str(error)
    found["registered"] = "resnet10_cifar.mine" in advcl_hub.releases()
    return found


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_registry_costs_the_names_of_weights_only(case: str, tmp_path: Path) -> None:
    assert {*timm.list_models(), *timm.list_models(pretrained=True)} >= NAMES  # where nothing has changed
    found = in_new_process(import_with_another_registry, case, tmp_path)
    part = f"timm.models._registry.{CHANGED[case][0]}, which timm {timm.__version__} "
    change = "no longer has" if CHANGED[case][1] is None else "has changed"
    (warning,) = found["warnings"]
    assert warning.startswith("UserWarning: ") and part + change in warning
    for words in ("update advcl-hub or install an earlier timm", "no names in timm", "hf-hub:", "folders", "without weights"):
        assert words in warning
    assert found["classes"] == 10 and found["classes of a folder"] == 0
    assert found["listed"] == found["half"] == [] and found["default"] == [""] and found["entry point"]
    assert part + change in found["refusal"] and is_one_sentence(found["refusal"]) and not found["registered"]


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


@pytest.mark.slow
def test_a_registry_that_has_moved_is_one_warning_for_a_user() -> None:
    code = f"""
import timm, sys
sys.modules["timm.models._registry"] = None  # what is imported from there fails, but timm has it already
del timm.models._registry
import advcl_hub
assert timm.create_model("resnet10_cifar").num_classes == 10 and not timm.models.is_model_pretrained("{RELEASED}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning:") == 1 and "timm.models._registry._model_entrypoints" in done.stderr


def other_arguments(function: Any) -> Callable[..., Any]:
    return lambda model, path: function(model, path)


def export_without_its_writer(change: Callable[[Any], Any] | None, folder: Path) -> dict[str, Any]:
    """In a new process: what works although timm writes configs in another way."""
    hide("_hub", "save_config_for_hf", change)
    found: dict[str, Any] = {"warnings": import_warnings(), "listed": timm.list_pretrained("resnet10_cifar*")}
    from advcl_hub.hub.export import export_folder

    try:
        export_folder(timm.create_model("resnet10_cifar"), folder / "new" / "export", results={})
    except ImportError as error:
        found["refusal"] = str(error)
    return found


@pytest.mark.parametrize("change", [None, other_arguments])
def test_without_timms_writer_only_an_export_fails(change: Callable[[Any], Any] | None, tmp_path: Path) -> None:
    found = in_new_process(export_without_its_writer, change, tmp_path)
    assert found["warnings"] == [] and RELEASED in found["listed"]
    assert "An export needs timm.models._hub.save_config_for_hf" in found["refusal"] and is_one_sentence(found["refusal"])
    assert list(tmp_path.iterdir()) == []


def as_set(function: Any) -> Callable[..., Any]:
    return lambda count, indices: function(count, indices, as_set=True)


def features_without_indices(change: Callable[[Any], Any] | None) -> dict[str, Any]:
    """In a new process: what works although timm chooses intermediate features in another way."""
    hide("_features", "feature_take_indices", change)
    found: dict[str, Any] = {"warnings": import_warnings(), "listed": timm.list_pretrained("resnet10_cifar*"), "refusals": []}
    images = torch.rand(2, 3, 32, 32)
    for name in ("resnet10_cifar", "preact_resnet18_cifar"):
        model: Any = timm.create_model(name)
        found[name] = tuple(model(images).shape)
        features = timm.create_model(name, features_only=True, out_indices=(0, 1))
        found[f"{name} features"] = len(features(images))
        for function in (lambda: model.forward_intermediates(images), model.prune_intermediate_layers):  # noqa: B023
            try:
                function()
            except ImportError as error:
                found["refusals"].append(str(error))
    return found


@pytest.mark.parametrize("change", [None, as_set])
def test_without_timms_indices_only_intermediate_features_fail(change: Callable[[Any], Any] | None) -> None:
    found = in_new_process(features_without_indices, change)
    assert found["warnings"] == [] and RELEASED in found["listed"] and len(found["refusals"]) == 4
    for name in ("resnet10_cifar", "preact_resnet18_cifar"):
        assert found[name] == (2, 10) and found[f"{name} features"] == 2
    (refusal,) = set(found["refusals"])
    assert "needs timm.models._features.feature_take_indices" in refusal and is_one_sentence(refusal)


def test_an_architecture_without_a_cfg_is_refused_before_anything_changes(tmp_path: Path) -> None:
    found = in_new_process(register_without_a_cfg, tmp_path)
    assert "timm has no cfg of cfgless" in found["refusal"] and is_one_sentence(found["refusal"])
    assert found["classes"] == 7 and not found["known"]


def register_without_a_cfg(folder: Path) -> dict[str, Any]:
    """In a new process: gives weights a name in an architecture of which timm knows no input size."""
    import advcl_hub

    def cfgless(pretrained: bool = False, **options: Any) -> Any:
        return timm.create_model("resnet10_cifar", **{key: value for key, value in options.items() if value is not None})

    timm.models.register_model(cfgless)
    advcl_hub.pull(RELEASED, folder / "export")
    (folder / "export" / "results.json").unlink()
    config = json.loads((folder / "export" / "config.json").read_text(encoding="utf-8")) | {"architecture": "cfgless"}
    (folder / "export" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError) as refusal, warnings.catch_warnings(action="ignore"):  # the weights are not checked
        advcl_hub.register("cfgless.mine", folder / "export")
    classes = timm.create_model("cfgless", num_classes=7).num_classes
    return {"refusal": str(refusal.value), "classes": classes, "known": timm.models.is_model_pretrained("cfgless.mine")}


# --------------------------------------------------------------------------------------------------------- sources

LIBRARIES = ("timm", "huggingface_hub")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(source: str) -> Iterator[str]:
    """Yields what a module touches of the private parts of timm and huggingface_hub."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr == "_registry" or node.attr.startswith("_model_"):  # of a module or a model under any name
                yield names[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"_model_\w+|[\w.]+", node.value):
            names = [node.value]  # for importlib, or for getattr
            if node.value.startswith("_model_"):
                yield node.value
        for name in names:
            library, *parts = name.split(".")
            if library in LIBRARIES and any(is_private(part) for part in parts):
                yield name


@pytest.mark.parametrize(
    "source",
    [
        "import timm.models._registry as r",
        "from timm.models import _registry",
        "from timm.layers._fx import register_notrace_module",
        "from huggingface_hub import _CACHED_NO_EXIST",
        "import timm\ntimm.models._hub.save_config_for_hf",
        "model._model_args = {}",
        "module._registry",
        "importlib.import_module('timm.models._features')",
        "getattr(model, '_model_args')",
    ],
)
def test_private_uses_reads_every_form(source: str) -> None:
    assert list(private_uses(source))


def test_private_uses_leaves_the_rest_alone() -> None:
    source = (
        "import timm\nfrom torch import _dynamo\nfrom timm.models import is_model\ntimm.__version__\nself._model\nx = '_model'"
    )
    assert not list(private_uses(source))


def test_private_parts_are_touched_in_one_module() -> None:
    paths = [path for folder in ("advcl_hub", "train", "model_cards") for path in sorted((ROOT / folder).rglob("*.py"))]
    used = {path.relative_to(ROOT).as_posix(): {*private_uses(path.read_text(encoding="utf-8"))} for path in paths}
    ours = used.pop("advcl_hub/private.py")
    assert {name: found for name, found in used.items() if found} == {}
    functions = {"timm.models._registry", "timm.models._hub", "timm.models._features", "model._model_args"}
    assert ours == {*functions, *STORES}, "give every private part a test here"
