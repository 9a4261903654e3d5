"""The global convolution g of DTL+, and the grid of patches that tokens are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Of tokens (B, L, C), which are the patches of an image after some others, such as the class token.

    Attributes:
        prefix: how many others.
        made_by: the module that makes the patches; its grid_size is their height and width.
    """

    prefix: int
    made_by: Any

    def of(self, length: int) -> tuple[int, int]:
        """Height and width of so many tokens.

        Raises:
            ValueError: they are not as many as the patches.
        """
        height, width = self.made_by.grid_size
        if length - self.prefix != height * width:
            raise ValueError(
                f"DTL+ convolves the grid of patches, {height} x {width} besides {self.prefix} other tokens, and got "
                f"{length} tokens. Use plus=False."
            )
        return height, width


@dataclass(frozen=True)
class Fixed:
    """What makes patches of images of one size.

    Attributes:
        grid_size: height and width.
    """

    grid_size: tuple[int, int]


class GlobalConv(nn.Conv2d):
    """g: depthwise, of an image with channels in dimension 1 or last, or of tokens.

    Args:
        width: of the backbone there.
        kernel_size: odd.
        channels: the dimension, -1 or 1.
        grid: of tokens.
    """

    def __init__(self, width: int, kernel_size: int, channels: int, grid: Grid | None) -> None:
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=False)
        self.channels, self.grid = channels, grid

    def forward(self, input: Tensor) -> Tensor:
        """Of a change of the backbone's features; the class token's is not convolved.

        Raises:
            ValueError: tokens that are no grid of patches.
        """
        if self.channels == 1:
            return super().forward(input)
        if input.dim() == 4:
            return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.grid is None:
            raise ValueError(
                f"DTL+ convolves the grid of patches, and of tokens {tuple(input.shape)} it is known for ViTs of timm "
                "and torchvision only. Use plus=False."
            )
        others, patches = input[:, : self.grid.prefix], input[:, self.grid.prefix :]
        image = patches.transpose(1, 2).reshape(len(input), -1, *self.grid.of(input.shape[1]))
        found = super().forward(image).flatten(2).transpose(1, 2)
        return torch.cat([others.to(found.dtype), found], 1)


def grid_of(model: Any) -> Grid | None:
    """Of a ViT's tokens; None of any other model.

    Raises:
        ValueError: it changes from image to image.
    """
    patches: Any = getattr(model, "patch_embed", None)
    if hasattr(model, "num_prefix_tokens") and hasattr(patches, "grid_size"):
        _check_fixed(model, patches)
        return Grid(model.num_prefix_tokens, patches)
    image, patch = (getattr(model, name, None) for name in ("image_size", "patch_size"))
    if hasattr(model, "class_token") and isinstance(image, int) and isinstance(patch, int):  # torchvision
        return Grid(1, Fixed((image // patch, image // patch)))
    return None


def _check_fixed(model: Any, patches: Any) -> None:
    moving = {
        "dynamic_img_size": getattr(model, "dynamic_img_size", False),
        "dynamic_img_pad": getattr(patches, "dynamic_img_pad", False),
        "strict_img_size=False": not getattr(patches, "strict_img_size", True),
        "patch_drop": not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))),
    }
    for what, is_so in moving.items():
        if is_so:
            raise ValueError(
                f"DTL+ convolves the grid of patches, which has to be the same for all images, but {what} of the model "
                "lets it change. Use plus=False, or build the model without."
            )
