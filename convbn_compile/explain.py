"""explain: what the backend does to a model, norm by norm, and what it saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from convbn_compile import _distributed, _torch
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.lowering import lower
from convbn_compile.options import Lowering, Mode, Options
from convbn_compile.report import Report


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Report:
    """What mode="tune" folds in a model and what not, why, and the bytes saved for backward before and after.

    Runs the forward pass once, eagerly, under the grad mode of the caller; the compile caches are not used. Inputs,
    parameters, buffers and the random state are put back, gradients are not touched; lazy modules are initialised.

    Args:
        model: the module; its training flags decide which batch norms run on batch statistics. Of a
            DistributedDataParallel the module inside is called, in graphs split at the boundaries of gradient
            buckets, without communication; a module that fully_shard was applied to communicates.
        inputs: what the model is called with.
        kwargs: likewise.

    Returns:
        The report of all graphs of the model. `saved_bytes_before` is what plain Inductor saves.

    Raises:
        TypeError: `model` is not a module, or one of TorchScript.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> print(explain(net, torch.zeros(1, 3, 8, 8)))
        norm    kind        outcome    because
        ------  ----------  ---------  ---------
        1       batch norm  folded
        <BLANKLINE>
        folded 1 of 1 norms; saved for backward 0.00 MiB -> 0.00 MiB
    """
    check_module(model, "explain")
    return explain_mode(Mode.TUNE, model, inputs, kwargs)


def explain_mode(mode: Mode, model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Report:
    """`explain`, of one of the modes that fold; of Deploy only where no gradients are computed."""
    outer = getattr(model, "_orig_mod", model)
    model = unwrapped(outer)
    _distributed.warn_of_sharded_containers(model, "explain", stacklevel=4)
    reports: list[Report] = []
    options = Options(mode=mode, lowering=Lowering.AOT_EAGER)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> _torch.CompiledFunction:
        return lower(gm, example_inputs, options, reports.append, measure=True)

    def call(*inputs: Any, **kwargs: Any) -> Any:  # a function of its own: what is compiled here is not the model's
        return model(*inputs, **kwargs)

    with _unchanged(model, (inputs, kwargs)), _torch.leaving_no_trace(), _torch.ddp_forward(outer):
        _torch.compile_apart(call, backend=backend)(*inputs, **kwargs)
    return Report.sum([*reports, Report(refused=_distributed.in_no_graph(model))])


@contextlib.contextmanager
def _unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Run the model uncompiled inside, and undo what a forward pass does to tensors and to the random state."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]
    tensors += _torch.tensors_in(inputs)
    kept = [(tensor, _version(tensor), tensor.detach().clone()) for tensor in tensors]
    bound = [(tensor_of, dict(tensor_of)) for module in model.modules() for tensor_of in _tensors_of(module)]
    with torch.random.fork_rng(), _torch.not_compiled_in_place(model):
        try:
            yield
        finally:
            _torch.reshard(model)
            for tensor_of, names in bound:
                tensor_of.clear()
                tensor_of.update(names)
            for tensor, version, values in kept:
                if version is None or version != _version(tensor):
                    _write(tensor, values)


def _tensors_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _version(tensor: Tensor) -> int | None:
    """Grows with every change of the tensor; None if torch does not keep count."""
    return None if tensor.is_inference() else tensor._version


def _write(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)
