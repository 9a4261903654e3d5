"""Fine-tune a network of timm in a loop like that of timm's train.py: --torchcompile convbn_tune.

    pip install 'convbn-compile[trainers]'
    python examples/train_with_timm_script.py --torchcompile convbn_tune

train.py hands --torchcompile to torch.compile as the name of the backend and --torchcompile-mode as the mode. It calls
model.train() before each epoch, so batch norm is frozen by freeze_batch_norm; what timm's freeze_batch_norm_2d puts in
place of the norms is folded likewise.
"""

from __future__ import annotations

import torch
from _digits import LR, digits, loader, needs, parser, pretrained, print_results, print_what_is_folded
from torch import nn

import convbn_compile


def create_model() -> nn.Module:
    """Three convolutions with timm's BatchNormAct2d."""
    from timm.layers import ClassifierHead, ConvNormAct

    blocks = [ConvNormAct(1, 16, 3), ConvNormAct(16, 32, 3, stride=2), ConvNormAct(32, 64, 3, stride=2)]
    return nn.Sequential(*blocks, ClassifierHead(64, 10))


def train_one_epoch(
    model: nn.Module, batches: torch.utils.data.DataLoader, optimizer: torch.optim.Optimizer, loss_fn: nn.Module
) -> list[float]:
    model.train()
    losses = []
    for images, labels in batches:
        loss = loss_fn(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--torchcompile", nargs="?", const="inductor", help="backend of torch.compile")
    arguments.add_argument("--torchcompile-mode", help="mode of torch.compile: tune, eval, or a preset of Inductor's")
    args = arguments.parse_args()

    print_what_is_folded()
    model = convbn_compile.freeze_batch_norm(pretrained(create_model))
    train_model = model
    if args.torchcompile:
        train_model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    batches, optimizer = loader(digits()[0]), torch.optim.Adam(model.parameters(), lr=LR)
    losses: list[float] = []
    for _ in range(args.epochs):
        losses += train_one_epoch(train_model, batches, optimizer, nn.CrossEntropyLoss())
    print_results(losses, model)


if __name__ == "__main__":
    with needs("'convbn-compile[trainers]'"):
        main()
