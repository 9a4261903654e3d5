"""Reports that live as long as torch's compile cache: on a cache hit the joint pass does not run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from convbn_compile import _torch
from convbn_compile.lowering import uuid
from convbn_compile.options import Options
from convbn_compile.report import Report


def key(gm: fx.GraphModule, inputs: Sequence[Tensor], options: Options) -> str:
    """A name for what the report of a Dynamo graph depends on: its code, its inputs, grad mode and our options."""
    code = [module.code for module in gm.modules() if isinstance(module, fx.GraphModule)]
    facts = [uuid(options), *code, str(torch.is_grad_enabled()), *_autocast()]
    for item in inputs:
        if isinstance(item, Tensor):
            facts.append(f"{tuple(item.shape)} {item.dtype} {item.device.type} {item.requires_grad}")
        else:
            facts.append(type(item).__name__)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _autocast() -> list[str]:
    """Which autocast is on where the model is called: the graph's own code does not show it."""
    kinds = ("cpu", "cuda")
    return [f"{kind} {torch.get_autocast_dtype(kind)}" for kind in kinds if torch.is_autocast_enabled(kind)]


def store(name: str, report: Report) -> Report:
    """Write the report beside torch's compile cache, if the disk can be written to, and return it."""
    file = _file(name)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(report.to_dict()))
        written.replace(file)
    return report


def load(name: str) -> Report | None:
    """The report that `store` wrote, or None."""
    try:
        return Report.from_dict(json.loads(_file(name).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(name: str) -> Path:
    return Path(_torch.cache_dir()) / "convbn_compile" / f"{name}.json"
