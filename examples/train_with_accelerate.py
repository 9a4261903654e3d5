"""Fine-tune with Accelerate, compiled by its own option, in Tune mode.

    pip install 'convbn-compile[trainers]'
    python examples/train_with_accelerate.py

Accelerate takes the name of a backend from a closed list, which has Inductor and no backend of another package. So it
is told to use Inductor, and accelerator.prepare(), where it calls torch.compile, runs inside inductor_patched().
"""

from __future__ import annotations

import torch
from _digits import LR, SmallNet, arguments, digits, loader, needs, pretrained, print_results, print_what_is_folded
from torch.nn import functional as F  # noqa: N812

import convbn_compile


def main() -> None:
    args = arguments(__doc__)
    from accelerate import Accelerator

    print_what_is_folded()
    accelerator = Accelerator(dynamo_backend="inductor" if args.compile else "no")
    net = convbn_compile.freeze_batch_norm(pretrained(SmallNet))
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    with convbn_compile.inductor_patched(lowering=args.lowering):
        model, optimizer, batches = accelerator.prepare(net, optimizer, loader(digits()[0]))

    losses = []
    for _ in range(args.epochs):
        model.train()  # batch norm stays frozen
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print_results(losses, net)


if __name__ == "__main__":
    with needs("'convbn-compile[trainers]'"):
        main()
