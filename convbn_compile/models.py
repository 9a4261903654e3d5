"""Models by name: of timm, torchvision, transformers, or made by a Python file of one's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import operator
import pickle
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile._extras import require

FORMS = "timm:NAME, torchvision:NAME, transformers:CLASS_OR_CONFIG, or path.py:callable"


WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the keys of a state_dict."""


class ModelError(RuntimeError):
    """A model that is named could not be made, or its weights not be loaded."""


def load_model(name: str, *, pretrained: bool = False, checkpoint: Path | None = None) -> nn.Module:
    """The model of a name, in eval mode.

    Args:
        name: `timm:resnet18`, `torchvision:resnet18`; `transformers:` and a class (ResNetModel), a configuration
            (ResNetConfig), a folder or a repository with a config.json; or `path.py:callable`, where the callable is
            called without arguments, or is a module.
        pretrained: with the weights that the library downloads; random ones otherwise.
        checkpoint: a state_dict to load, written by torch.save or by safetensors.

    Raises:
        ValueError: `name` has none of these forms.
        ModelError: the model could not be made, or its weights not be loaded.
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    library, rest = split(name)
    try:
        model = LIBRARIES[library](rest, pretrained=pretrained) if library else _from_file(rest, pretrained=pretrained)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        if library and isinstance(error, ModuleNotFoundError):
            raise
        what = "its weights could not be loaded" if pretrained else "it could not be made"
        raise ModelError(f"{name}: {what}: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: a torch.nn.Module is needed, got {model!r} ({type(model).__name__}).")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def split(name: str) -> tuple[str, str]:
    """The library and the name within, or an empty string and `path.py:callable`.

    Raises:
        ValueError: neither.
    """
    library, _, rest = name.partition(":")
    if library in LIBRARIES and rest:
        return library, rest
    file, _, function = name.rpartition(":")
    if file.endswith(".py") and function:
        return "", name
    raise ValueError(f"{name!r} names no model. Known forms: {FORMS}.")


def default_shapes(name: str, model: Any, batch: int = 4) -> dict[str, tuple[int, ...]]:
    """What a model of a library is called with: the argument, "" for the first, to its shape; empty if not known."""
    library, _ = split(name)
    if library == "timm":
        return {"": (batch, *model.pretrained_cfg["input_size"])}
    if library == "torchvision":
        return {"": (batch, 3, 224, 224)}
    if library == "transformers" and getattr(model, "main_input_name", None) == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": (batch, getattr(model.config, "num_channels", 3), height, width)}
    return {}


def declare_torchvision_operators() -> None:
    """Let torchvision's wheel for CUDA import next to a torch without: it wants two operators to exist.

    Does nothing where torchvision is not installed, or imports. timm and transformers import torchvision.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def load_checkpoint(model: nn.Module, file: Path) -> None:
    """Load a state_dict that torch.save or safetensors wrote; also one inside {"state_dict": ...} or {"model": ...}.

    It may be that of the model inside DistributedDataParallel, torch.compile, or both.

    Raises:
        ModelError: the file cannot be read, holds no state_dict, or that of another model.
    """
    try:
        state = _read(file)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
        if not _is_state_dict(state):
            raise ModelError(f"{file}: is no state_dict, but {reprlib.repr(state)} ({type(state).__name__}).")
        model.load_state_dict(_without_wrappers(state, set(model.state_dict())))
    except (ModelError, ModuleNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file}: is no state_dict: it cannot be read, or holds more than tensors, which could run code when "
            "loaded. Write the weights alone: torch.save(model.state_dict(), file)."
        ) from error
    except Exception as error:
        raise ModelError(f"{file}: its weights could not be loaded: {brief(error)}") from error


def _is_state_dict(state: Any) -> bool:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return False
    return not state or any(isinstance(value, Tensor) for value in state.values())


def _without_wrappers(state: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """The state_dict without the prefixes that wrappers wrote, as many as suit the keys of the model."""
    found = [dict(state)]
    while any(key.startswith(WRAPPERS) for key in found[-1]):
        found.append({_without_wrapper(key): value for key, value in found[-1].items()})
    return max(found, key=lambda candidate: len(candidate.keys() & wanted))


def _without_wrapper(key: str) -> str:
    return key.partition(".")[2] if key.startswith(WRAPPERS) else key


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return require("safetensors.torch", extra="zoo").load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def brief(error: BaseException) -> str:
    """An exception in a few lines."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:6], *["..."][: len(lines) > 6]])


def _timm(name: str, *, pretrained: bool) -> Any:
    declare_torchvision_operators()
    timm = require("timm", extra="zoo")
    if "/" not in name and not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=pretrained)


def _torchvision(name: str, *, pretrained: bool) -> Any:
    declare_torchvision_operators()
    models = require("torchvision", extra="zoo").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    arguments: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if not pretrained:  # else a segmentation model would download its backbone's, and googlenet initialise for long
        known = inspect.signature(models.get_model_builder(name)).parameters
        arguments |= {key: value for key, value in _UNTRAINED.items() if key in known}
    return models.get_model(name, **arguments)


_UNTRAINED: Mapping[str, Any] = {"weights_backbone": None, "init_weights": False}


def _transformers(name: str, *, pretrained: bool) -> Any:
    declare_torchvision_operators()
    transformers = require("transformers", extra="zoo")
    found = getattr(transformers, name, None)
    if found is None:
        return _from_hub(transformers, name, pretrained=pretrained)
    if pretrained:
        raise ModelError(f"transformers:{name}: a class has no weights: name a repository or a folder that has them.")
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedConfig):
        return transformers.AutoModel.from_config(found())
    config = getattr(found, "config_class", None)
    if config is None:
        raise ModelError(
            f"transformers:{name}: a class with a configuration of its own is needed, such as ResNetModel or "
            "ResNetConfig; or a folder or repository with a config.json."
        )
    return found(config())


def _from_hub(transformers: Any, name: str, *, pretrained: bool) -> Any:
    if "/" not in name and not Path(name).exists():
        raise _unknown("transformers", name, dir(transformers))
    if pretrained:
        return transformers.AutoModel.from_pretrained(name)
    return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))


def _from_file(name: str, *, pretrained: bool) -> Any:
    """What `path.py:callable` makes; the file's folder can be imported from, as when Python runs the file."""
    path, _, attribute = name.rpartition(":")
    if pretrained:
        raise ModelError(f"{name}: a callable of one's own loads its own weights, or give a checkpoint.")
    if not Path(path).is_file():
        raise ModelError(f"{name}: there is no file {path}.")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(f"_model_of_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    made = operator.attrgetter(attribute)(module)
    return made if isinstance(made, nn.Module) else made()


def _unknown(library: str, name: str, known: Iterable[str]) -> ModelError:
    close = difflib.get_close_matches(name, list(known), n=1)
    return ModelError(f"{library} has no model {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))


LIBRARIES: Mapping[str, Callable[..., Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
