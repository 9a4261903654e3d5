"""Fine-tune a small network in Tune mode on several devices, with DDP or FSDP2, and checkpoints that resume.

    torchrun --nproc-per-node 2 examples/distributed.py --strategy ddp --epochs 2 --checkpoints out/digits
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2 --epochs 4 --checkpoints out/digits --resume

Rank 0 trains a network on the digits 0 to 4, which gives batch norm its running statistics; all ranks fine-tune it on 5
to 9. The data are scikit-learn's digits, 8x8, or made if scikit-learn is not installed. NCCL where there are GPUs, gloo
on CPU. A checkpoint of one strategy or number of processes resumes with another.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import convbn_compile


class Block(nn.Module):
    """Convolution, norm and activation of a class of our own, so that fully_shard may be applied to it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        activated: Tensor = self.norm(self.conv(x)).relu()
        return activated


class Net(nn.Module):
    """A network for images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(1, 16, 1), Block(16, 32, 2), Block(32, 64, 2)])
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to scores (N, 5)."""
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def digits() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels 0 to 9; noise around ten made images without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(1000) % 10
        images = torch.rand(10, 1, 8, 8, generator=generator)[labels]
        return images + 0.2 * torch.randn(images.shape, generator=generator), labels
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def pretrained(images: Tensor, labels: Tensor, steps: int = 60) -> dict[str, Tensor]:
    """The state of a network that was trained on one device, in the ordinary way."""
    model = Net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.state_dict()


def wrapped(strategy: str, device: torch.device, weights: Mapping[str, Any], lowering: str) -> nn.Module:
    """The network of rank 0 on all ranks, turned on."""
    model = Net().to(device)
    convbn_compile.turn_on(model, lowering=lowering)
    if strategy == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        # fully_shard copies nothing from rank 0: neither parameters nor batch norm's statistics
        set_model_state_dict(
            model, dict(weights), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        )
        return model
    if weights:
        model.load_state_dict(weights)
    return DistributedDataParallel(model)  # copies parameters and buffers from rank 0


class Checkpoints:
    """Model, optimizer and epoch, a directory for each epoch, by torch.distributed.checkpoint; called by all ranks."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.model, self.optimizer = path, model, optimizer

    def save(self, epoch: int) -> None:
        """After so many epochs."""
        dcp.save(self._state(epoch), checkpoint_id=self.path / f"epoch_{epoch:04}")

    def load_last(self) -> int:
        """How many epochs are done; a checkpoint is complete when its .metadata is written."""
        last = max(self.path.glob("epoch_*/.metadata")).parent
        state = self._state(epoch=0)
        dcp.load(state, checkpoint_id=last)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(state["epoch"])

    def _state(self, epoch: int) -> dict[str, Any]:
        """The names are those of the plain network, with either strategy."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments, "epoch": epoch}


def train(model: nn.Module, loader: DataLoader[Any], optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """One epoch; the mean loss of all ranks."""
    total = torch.zeros(2, device=device)
    for images, labels in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach() * len(images), loss.new_tensor(len(images))])
    dist.all_reduce(total)
    return total[0] / total[1]


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    """Fine-tune on this rank's share of the data."""
    torch.manual_seed(0)
    images, labels = digits()
    source = labels < 5
    weights = pretrained(images[source], labels[source]) if dist.get_rank() == 0 else {}
    target = TensorDataset(images[~source], labels[~source] - 5)
    sampler: DistributedSampler[Any] = DistributedSampler(target, seed=0)
    loader = DataLoader(target, arguments.batch_size, sampler=sampler, drop_last=True)

    model = wrapped(arguments.strategy, device, weights, arguments.lowering).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    checkpoints = Checkpoints(arguments.checkpoints, model, optimizer) if arguments.checkpoints else None
    done = checkpoints.load_last() if arguments.resume and checkpoints else 0

    report = convbn_compile.explain(model, images[: arguments.batch_size].to(device))  # on all ranks: FSDP2 gathers
    tell(f"{arguments.strategy}, {dist.get_world_size()} processes: {report.summary()}")
    for epoch in range(done, arguments.epochs):
        sampler.set_epoch(epoch)
        loss = train(model, loader, optimizer, device)
        tell(f"epoch {epoch + 1}: loss {loss.item():.5f}")
        if checkpoints:
            checkpoints.save(epoch + 1)


def tell(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--epochs", type=int, default=3, help="in all, those before resuming included")
    parser.add_argument("--batch-size", type=int, default=32, help="of one process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpoints", type=Path, help="a directory, written to after every epoch")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="inductor")
    arguments = parser.parse_args()
    if arguments.resume and not any((arguments.checkpoints or Path()).glob("epoch_*/.metadata")):
        parser.error("--resume needs a directory that has checkpoints: --checkpoints")
    if "RANK" not in os.environ:
        parser.error("start it by torchrun, as above")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        run(arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
