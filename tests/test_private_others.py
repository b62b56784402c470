"""Private parts of torch and accelerate: each is what we take it for, and there are no others."""

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import ROOT
from tests.support.warm import in_new_process
from tests.test_private import is_private

HOOKS = {
    "_forward_hooks": nn.Module.register_forward_hook,
    "_forward_pre_hooks": nn.Module.register_forward_pre_hook,
    "_backward_hooks": nn.Module.register_full_backward_hook,
    "_backward_pre_hooks": nn.Module.register_full_backward_pre_hook,
}


@pytest.mark.parametrize("part", HOOKS)
def test_torch_keeps_hooks_where_we_look_for_them(part: str) -> None:
    module = nn.Conv2d(1, 1, 1)
    assert not getattr(module, part), f"torch.nn.Module.{part}"
    HOOKS[part](module, lambda *args: None)
    assert getattr(module, part), f"torch.nn.Module.{part}"


def test_torch_keeps_modules_by_name() -> None:
    assert list(nn.Sequential(nn.ReLU(), nn.Identity())._modules) == ["0", "1"], "torch.nn.Module._modules"


def test_torch_moves_modules_by_apply() -> None:
    calls = []

    class Child(nn.Module):
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            calls.append(fn(torch.zeros(1, 1, 1, 1)))
            return super()._apply(fn, recurse)

    nn.Sequential(Child()).to(dtype=torch.float64, memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.Sequential(Child()).double()
    assert [moved.dtype for moved in calls] == [torch.float64] * 2, "torch.nn.Module._apply"


def test_torch_has_one_class_for_every_batch_norm() -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)
    assert [issubclass(kind, _BatchNorm) for kind in kinds] == [True] * 4 + [False], "torch.nn.modules.batchnorm._BatchNorm"


def test_torch_keeps_the_model_in_a_compiled_one() -> None:
    model = nn.Linear(1, 1)
    compiled: Any = torch.compile(model)
    assert compiled._orig_mod is model and [*compiled.state_dict()] == ["_orig_mod.weight", "_orig_mod.bias"], "_orig_mod"


def test_torch_shows_each_operation() -> None:
    seen = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func._overloadpacket, func._schema.name, [argument.name for argument in func._schema.arguments]))
            return func(*args, **(kwargs or {}))

    with Operations():
        torch.mm(torch.ones(1, 1), torch.ones(1, 1))
    last = (torch.ops.aten.mm, "aten::mm", ["self", "mat2"])
    assert seen[-1] == last, "TorchDispatchMode, _overloadpacket or _schema"


def compile_a_function() -> dict[str, Any]:
    """In a new process: what we use of torch's compiler beside `torch.compile`."""
    from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

    settings = torch._dynamo.config
    found: dict[str, Any] = {name: hasattr(settings, name) for name in ("cache_size_limit", "optimize_ddp")}
    clear_compilation_metrics()
    torch.compile(torch.sin, backend="eager", fullgraph=True)(torch.ones(2))
    found["get_compilation_metrics"] = [hasattr(metric, "compile_id") for metric in get_compilation_metrics()] == [True]
    clear_compilation_metrics()
    found["clear_compilation_metrics"] = not get_compilation_metrics()
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x + torch._dynamo.graph_break(), backend="eager", fullgraph=True)(torch.ones(2))
    except torch._dynamo.exc.TorchDynamoException:
        found["exc.TorchDynamoException"] = True
    return found


def test_torchs_compiler_tells_what_it_did() -> None:
    parts = (
        "cache_size_limit",
        "optimize_ddp",
        "get_compilation_metrics",
        "clear_compilation_metrics",
        "exc.TorchDynamoException",
    )
    found = in_new_process(compile_a_function)
    assert {f"torch._dynamo: {part}": found.get(part) for part in parts} == {f"torch._dynamo: {part}": True for part in parts}


def prepare_a_model() -> dict[str, Any]:
    """In a new process: where accelerate keeps what holds for the whole process, and what it does to a model."""
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState, GradientState, PartialState

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    model = accelerator.prepare_model(nn.Linear(1, 1))
    found: dict[str, Any] = {"_original_forward": "_original_forward" in vars(model)}
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    found["_original_forward is taken away"] = "_original_forward" not in vars(plain)
    found["PartialState._shared_state"] = PartialState._shared_state.get("distributed_type") is DistributedType.NO
    found["AcceleratorState._shared_state"] = AcceleratorState._shared_state is vars(accelerator.state)
    found["GradientState._shared_state"] = GradientState._shared_state is vars(accelerator.gradient_state)
    for state in (AcceleratorState, GradientState):
        state._shared_state.clear()
    other = Accelerator(cpu=True)
    found["empty _shared_state"] = (other.mixed_precision, other.gradient_accumulation_steps) == ("no", 1)
    return found


def test_accelerate_keeps_its_state_where_we_put_ours() -> None:
    found = in_new_process(prepare_a_model)
    assert found == dict.fromkeys(found, True)


# ---------------------------------------------------------------------------------------------------------- sources

OF_NAMED_TUPLES = {"_asdict", "_fields"}  # which Python documents


def foreign_uses(trees: list[ast.Module]) -> set[str]:
    """Returns the private names that modules import, or read of objects, without any of them defining such a name."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - own - OF_NAMED_TUPLES
    read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"}
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    read |= {part for node in imports for name in node.names for part in (*(node.module or "").split("."), name.name)}
    return {name for name in read if is_private(name)}


def test_foreign_uses_reads_attributes_and_imports_and_leaves_our_own_alone() -> None:
    imports, ours = "from torch._a.b import _c", "class _E:\n    _f: int\n    def _g(self): self._h = _E._f"
    assert foreign_uses([ast.parse(f"{imports}\n{ours}\nx._d\nsuper()._g()\nself._g()")]) == {"_a", "_c", "_d", "_g"}


def test_each_private_part_of_other_libraries_has_a_test_above() -> None:
    paths = [path for folder in ("advcl_hub", "train", "model_cards") for path in sorted((ROOT / folder).rglob("*.py"))]
    uses = foreign_uses([ast.parse(path.read_text(encoding="utf-8")) for path in paths])
    # Named in strings only: _orig_mod and _original_forward.
    torch_parts = {*HOOKS, "_modules", "_apply", "_BatchNorm", "_schema", "_overloadpacket", "_python_dispatch", "_dynamo"}
    assert uses == {*torch_parts, "_shared_state"}, "give every private part a test in this file"
