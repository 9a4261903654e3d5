"""NeuroFlux: profile a network, plan its blocks for a memory budget, train them one after the other, export an exit."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from convbn_compile._arguments import count, located, num_bytes, one_of, share, shown
from convbn_compile.local_learning._cache import cache_bytes
from convbn_compile.local_learning._lines import Profile
from convbn_compile.local_learning._local import Optimizer, resident_bytes, seeded, sgd
from convbn_compile.local_learning._network import Network, built
from convbn_compile.local_learning._planning import measuring, planned
from convbn_compile.local_learning._reported import reported
from convbn_compile.local_learning._settings import run_settings
from convbn_compile.local_learning._source import Images, check_dataset
from convbn_compile.local_learning._state import State
from convbn_compile.local_learning._training import Training, logger, progress_bar
from convbn_compile.local_learning._units import units_of
from convbn_compile.local_learning.controller import Controller
from convbn_compile.local_learning.partitioner import Block, Partitioner, Plan
from convbn_compile.local_learning.profiler import profiled
from convbn_compile.local_learning.report import Exit, Report
from convbn_compile.local_learning.storage import Storage
from convbn_compile.options import Options


class NeuroFlux:
    """Trains a convolutional network from one local loss to the next, inside of a memory budget (arXiv 2402.14139).

    The network is a list of units. Each gets an auxiliary head and learns from its own loss, so that what backward
    needs is that of one unit at a time. Consecutive units that need alike are a block; each block is trained with the
    batch that fills the budget, and what it makes of the data is the data of the next one. The best early exit is
    exported.

    Where the paper says nothing (widths of heads, grouping, optimizer, choice of the exit), docs/neuroflux.md says what
    is done here.

    Args:
        model: a VGG or ResNet of torchvision or timm, or an ordered list (or nn.Sequential) of modules, the last of
            which is the classifier; each gets the tensor that the one before returns. Trained in place.
        num_classes: of the classifier.
        memory_budget: of a step at its peak: bytes, or text such as "300MiB" or "2GiB". Weights, gradients, the
            optimizer's state, activations and what operators need inside count; images that a loader holds, and what a
            process or CUDA context needs without tensors, do not. Other blocks are in the storage while one is trained.
        storage: a folder for caches, finished blocks and checkpoints. A run that was killed goes on from there.
        batch_size_limit: the largest batch.
        similarity: by how much, relatively, batches of units in a block may differ.
        exit_tolerance: how far below the best the accuracy of the chosen exit may be, a share of images.
        margin: the share of the budget that is left free.
        head_filters: of every head, as in classic local learning (256); by default adaptive.
        cache: "auto" measures whether reading a block's input from a cache is faster than computing it again; "always",
            "never". Where reading an image twice gives two images (augmentation), "auto" computes again.
        cache_dtype: torch.float32, or torch.float16 for half the space.
        optimizer: from parameters to an optimizer, one for each unit; by default SGD with lr=0.05, momentum=0.9 and
            weight_decay=5e-4.
        lr_batch_size: the batch that the optimizer's learning rate is for; that of others goes with the batch's root.
        seed: of heads, order and dropout.
        device: where blocks are trained, one at a time; by default where the model is.
        options: of torch.compile(backend="convbn_tune"), such as {"lowering": "aot_eager"}.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument of a wrong value; a network whose units are not known, or that does not fit.

    Examples:
        >>> import tempfile
        >>> from torch.utils.data import TensorDataset
        >>> unit = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
        >>> net = [unit(3, 8), unit(8, 16), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))]
        >>> images = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
        >>> flux = NeuroFlux(net, 4, "2MiB", tempfile.mkdtemp(), options={"lowering": "aot_eager"})
        >>> report = flux.fit(images, images, epochs=1)
        >>> flux.export()(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        num_classes: int,
        memory_budget: int | str,
        storage: str | os.PathLike[str],
        *,
        batch_size_limit: int = 512,
        similarity: float = 0.4,
        exit_tolerance: float = 0.005,
        margin: float = 0.1,
        head_filters: int | None = None,
        cache: str = "auto",
        cache_dtype: torch.dtype = torch.float32,
        optimizer: Optimizer = sgd,
        lr_batch_size: int = 128,
        seed: int = 0,
        device: str | torch.device | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._units = units_of(model)
        self.num_classes = located("num_classes", count, num_classes)
        self.memory_budget = located("memory_budget", num_bytes, memory_budget)
        self.batch_size_limit = located("batch_size_limit", count, batch_size_limit)
        self.similarity = share("similarity", similarity, below=float("inf"))
        self.exit_tolerance = share("exit_tolerance", exit_tolerance)
        self.margin = share("margin", margin)
        self.head_filters = None if head_filters is None else located("head_filters", count, head_filters)
        self.cache = one_of("cache", cache, ("auto", "always", "never"))
        self.cache_dtype = one_of("cache_dtype", cache_dtype, (torch.float32, torch.float16))
        self.lr_batch_size = located("lr_batch_size", count, lr_batch_size)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an integer of 0 or more, got {shown(seed)}.")
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a function from parameters to an optimizer, got {shown(optimizer)}.")
        if not isinstance(storage, (str, os.PathLike)) or not os.fspath(storage):
            raise TypeError(f"storage must be the path of a folder, got {shown(storage)}.")
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f'options must be a mapping, such as {{"lowering": "aot_eager"}}, got {shown(options)}.')
        self.seed, self.optimizer, self.storage = seed, optimizer, storage
        self.options = dict(options or {})
        Options.parse("train", self.options)
        first = next(self._units.units[0].module.parameters())
        self.device = first.device if device is None else _device(device)
        self._network: Network | None = None
        self._profile: Profile | None = None
        self._plan: Plan | None = None
        self._report: Report | None = None

    def profile(self, example: Tensor, *, progress: bool = True) -> Profile:
        """Measure what a step of each unit takes, by batch size. Values of the network stay what they are.

        Args:
            example: images [N, C, H, W], of which only shape and dtype count.
            progress: show a bar, on a terminal.

        Returns:
            Lines with R², as a table (`print`) and a plot (`.plot(path)`).

        Raises:
            TypeError: `example` is not a tensor.
            ValueError: the network does not take it, or is not what its units make one after the other; a step fails.
            ModuleNotFoundError: tqdm is not installed.
        """
        if not isinstance(example, Tensor):
            raise TypeError(f"profile: example must be a tensor of images [N, C, H, W], got {shown(example)}.")
        if example.dim() < 2 or len(example) == 0 or example.is_meta:
            raise ValueError(
                f"profile: example must have an image at least, [N, C, H, W], got a tensor of shape "
                f"{list(example.shape)} on {example.device}."
            )
        network = self._build(example)
        budget, found = self.memory_budget * (1.0 - self.margin), []
        with measuring(self.device, self.seed), progress_bar(len(network.units), "profile", show=progress) as bar:
            for unit, both in zip(network.units, pairwise([network.input_shape, *network.shapes]), strict=True):
                found.append(profiled(unit, both, self.optimizer, self.device, budget, self.batch_size_limit))
                bar.update()
        self._profile, self._plan = Profile(tuple(found)), None
        return self._profile

    def plan(self) -> Plan:
        """Group units into blocks, and find each block's batch size, which a step of each unit is run with.

        Returns:
            The blocks, as a table (`print`).

        Raises:
            ValueError: profile was not called; a unit does not fit into the budget with a single image, or cannot be
                trained with the batch that does.
        """
        if self._profile is None and self._plan is not None:
            return self._plan
        if self._profile is None or self._network is None:
            raise ValueError("plan needs a profile: call profile(example) before, with images like those of training.")
        self._plan = self._planned(self._network, self._profile, self.batch_size_limit)
        return self._plan

    def _planned(self, network: Network, profile: Profile, limit: int) -> Plan:
        if self.cache == "never":
            before = accumulate((resident_bytes(unit.unit) for unit in network.units), initial=0)
            pairs = zip(profile.units, before, strict=False)
            profile = Profile(tuple(replace(unit, before=size) for unit, size in pairs))
        partitioner = Partitioner(self.memory_budget, self.margin, limit, self.similarity)
        return planned(partitioner, network, profile, self.optimizer, self.device, self.seed)

    def fit(self, train: Dataset[Any], val: Dataset[Any], epochs: int, *, progress: bool = True) -> Report:
        """Train block after block; in a storage with a run that was killed, what is left of it.

        Decisions are logged to "convbn_compile.local_learning". Afterwards the network is in eval mode.

        Args:
            train: a dataset with a length, of pairs: an image [C, H, W] and its class, an int.
            val: likewise; exits are chosen by it.
            epochs: of each block.
            progress: show bars, on a terminal.

        Returns:
            What it came to, as tables (`print`).

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: the storage has a run with other settings, or not enough space; nothing fits; an item of a
                dataset is no such pair; a class is out of range.
            ModuleNotFoundError: numpy or tqdm is not installed.
        """
        epochs = located("epochs", count, epochs)
        data = {}
        for name, dataset in (("train", train), ("val", val)):
            check_dataset(name, dataset)
            data[name] = Images(name, dataset, self.num_classes)
        storage = Storage(self.storage)
        with storage.locked(), seeded(self.device, self.seed):
            self._fit(storage, data, epochs, progress=progress)
        return self._done()

    def _fit(self, storage: Storage, data: dict[str, Images], epochs: int, *, progress: bool) -> None:
        example, other = (images.first(2) for images in data.values())
        if example.shape[1:] != other.shape[1:]:
            raise ValueError(
                f"val: its images have the shape {list(other.shape[1:])}, those of train {list(example.shape[1:])}."
            )
        network = self._build(example)
        settings, manifest = run_settings(vars(self), network, epochs, data), storage.manifest()
        if manifest is None:
            state = self._begin(storage, settings, network, data, progress=progress)
        else:
            state = State.read(manifest, settings, storage.folder)
            logger.warning("going on with the run in %s: %d blocks are done", storage.folder, state.block)
            storage.tidy(state.entries)
            if state.block < len(state.plan):
                self._fitting(network, data, progress=progress)  # code is as the run's if compiled for the same batches
        blocks = tuple(Block(**{**block, "names": tuple(block["names"])}) for block in state.plan)
        self._plan = plan = Plan(blocks, self.memory_budget, self.margin)
        training = Training(
            self.optimizer, self.lr_batch_size, epochs, self.seed, self.cache, self.cache_dtype, self.device
        )
        Controller(network, plan, training, data, storage, state, progress=progress).run()
        self._report = reported(network, state, plan, self.exit_tolerance, self.device)
        if self._units.model is not None:
            self._units.model.eval()
        if state.to_dict() != manifest:
            storage.commit(state.to_dict(), state.entries)

    def exits(self) -> tuple[Exit, ...]:
        """All exits, with accuracy and parameters.

        Raises:
            ValueError: fit was not called.
        """
        return self._done().exits

    def export(self, exit: str | int = "best") -> nn.Module:
        """A copy of the network that ends at an exit, in eval mode.

        Args:
            exit: "best", the earliest whose accuracy is within `exit_tolerance` of the best; "last", the whole network;
                or the number or name of a unit.

        Returns:
            From images to logits.

        Raises:
            ValueError: there is no such exit; fit was not called.
        """
        report, network = self._done(), self._network
        assert network is not None
        numbers: dict[Any, int] = {each.name: each.unit for each in report.exits}
        numbers |= {each.unit: each.unit for each in report.exits}
        numbers |= {"best": report.chosen.unit, "last": len(report.exits) - 1}
        if isinstance(exit, bool) or not isinstance(exit, (str, int)) or exit not in numbers:
            names = [each.name for each in report.exits]
            raise ValueError(f'exit must be "best", "last", or one of {names} or its number, got {shown(exit)}.')
        return copy.deepcopy(network.until(numbers[exit])).eval()

    def _done(self) -> Report:
        if self._report is None:
            raise ValueError("There are no exits yet: call fit(train, val, epochs) before.")
        return self._report

    def _build(self, example: Tensor) -> Network:
        """Units with heads, the same ones for images of the same shape."""
        network = built(self._units, example, self.num_classes, self.head_filters, self.options, self.seed)
        if self._network is None or self._network.input_shape != network.input_shape:
            self._network, self._profile, self._plan, self._report = network, None, None, None
        return self._network

    def _fitting(self, network: Network, data: dict[str, Images], *, progress: bool) -> Plan:
        """The plan, whose batches the images are enough for."""
        profile = self._profile or self.profile(data["train"].first(2), progress=progress)
        plan = self._plan or self.plan()
        if any(block.batch_size > len(data["train"]) for block in plan.blocks):
            return self._planned(network, profile, len(data["train"]))
        return plan

    def _begin(
        self, storage: Storage, settings: dict[str, Any], network: Network, data: dict[str, Images], *, progress: bool
    ) -> State:
        """A new run; what cannot end well does not begin."""
        plan = self._fitting(network, data, progress=progress)
        if self.cache == "always":
            images = sum(map(len, data.values()))
            shapes = [network.shapes[block.units[-1]] for block in plan.blocks[:-1]]
            sizes = [cache_bytes(images, shape, self.cache_dtype) for shape in shapes]
            storage.check_space(max(map(sum, pairwise([0, *sizes])), default=0))
        start = storage.save("start.pt", [unit.state_dict() for unit in network.units])
        storage.load(start, mapped=True)  # what cannot be read is no beginning
        augmented = self.cache == "auto" and data["train"].augments
        state = State(settings, [asdict(block) for block in plan.blocks], start, augmented)
        storage.commit(state.to_dict(), state.entries)
        return state


def _device(given: Any) -> torch.device:
    try:
        device = torch.zeros(1, device=given).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f'device must be one that is there, such as "cuda:0", got {shown(given)}: {error}') from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, whose bytes can be told, got {shown(given)}.")
    return device
