"""Which blocks of torchvision and timm a chain can be made of, and what their F is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from convbn_compile.reversible._unit import Branch, Unit, WithShortcut, whole

SMOOTH = (nn.CELU, nn.ELU, nn.GELU, nn.Mish, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)
KINKED = (nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU, nn.Threshold)
"""Activations; a ReLU6 is a Hardtanh."""

Split = Callable[[str, nn.Module], list[Unit] | None]
"""The units of a block; None if its input and its output have other shapes."""


def projected(slot: str, absent: type[nn.Module] | None = None, *, rectified: bool = True) -> Split:
    """Of a block whose submodule `slot` is the projection of its shortcut.

    Args:
        slot: the submodule.
        absent: what it is where there is no projection; None if it is None then.
        rectified: the sum goes through an activation.
    """
    g = WithShortcut(slot)

    def split(path: str, block: nn.Module) -> list[Unit] | None:
        projection = getattr(block, slot)
        is_absent = projection is None if absent is None else isinstance(projection, absent)
        return [Unit(path, block, g, slot, rectified)] if is_absent else None

    return split


def residual(path: str, block: nn.Module) -> list[Unit]:
    """Of a block of a known class that is x + F(x) and no more."""
    return [Unit(path, block, whole)]


def unknown(path: str, block: nn.Module) -> list[Unit]:
    """Of a block that is taken for x + F(x), and for rectified where its activations are not known to be smooth."""
    smooth = any(isinstance(module, SMOOTH) for module in block.modules())
    kinked = any(isinstance(module, KINKED) for module in block.modules())
    return [Unit(path, block, whole, rectified=kinked or not smooth)]


def halves(attention: Callable[[Any, Tensor], Tensor], mlp: Callable[[Any, Tensor], Tensor]) -> Split:
    """Of a transformer's block, which is two units, as in the paper's Figure 4."""
    both = Branch(attention), Branch(mlp)

    def split(path: str, block: nn.Module) -> list[Unit]:
        return [Unit(path, block, g) for g in both]

    return split


def _attention_of_vit(block: Any, x: Tensor) -> Any:
    """Of torchvision."""
    x = block.ln_1(x)
    x, _ = block.self_attention(x, x, x, need_weights=False)
    return block.dropout(x)


def _mlp_of_vit(block: Any, x: Tensor) -> Any:
    return block.mlp(block.ln_2(x))


def _attention_of_swin(block: Any, x: Tensor) -> Any:
    """Of torchvision."""
    return block.stochastic_depth(block.attn(block.norm1(x)))


def _mlp_of_swin(block: Any, x: Tensor) -> Any:
    return block.stochastic_depth(block.mlp(block.norm2(x)))


def _attention_of_timm_vit(block: Any, x: Tensor) -> Any:
    return block.drop_path1(block.ls1(block.attn(block.norm1(x))))


def _mlp_of_timm_vit(block: Any, x: Tensor) -> Any:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attention_of_timm_swin(block: Any, x: Tensor) -> Any:
    return block.drop_path1(block._attn(block.norm1(x)))


def _mlp_of_timm_swin(block: Any, x: Tensor) -> Any:
    """timm makes a sequence of the image between the halves, which norm and mlp do not ask for."""
    return block.drop_path2(block.mlp(block.norm2(x)))


SPLITS: dict[tuple[str, str], Split] = {
    ("torchvision.models.resnet", "BasicBlock"): projected("downsample"),
    ("torchvision.models.resnet", "Bottleneck"): projected("downsample"),
    ("torchvision.models.regnet", "ResBottleneckBlock"): projected("proj"),
    ("torchvision.models.convnext", "CNBlock"): residual,
    ("torchvision.models.vision_transformer", "EncoderBlock"): halves(_attention_of_vit, _mlp_of_vit),
    ("torchvision.models.swin_transformer", "SwinTransformerBlock"): halves(_attention_of_swin, _mlp_of_swin),
    ("timm.models.resnet", "BasicBlock"): projected("downsample"),
    ("timm.models.resnet", "Bottleneck"): projected("downsample"),
    ("timm.models.regnet", "Bottleneck"): projected("downsample", absent=nn.Identity),
    ("timm.models.convnext", "ConvNeXtBlock"): projected("shortcut", absent=nn.Identity, rectified=False),
    ("timm.models.vision_transformer", "Block"): halves(_attention_of_timm_vit, _mlp_of_timm_vit),
    ("timm.models.swin_transformer", "SwinTransformerBlock"): halves(_attention_of_timm_swin, _mlp_of_timm_swin),
}
"""By the module and the name of the block's class."""


def split(path: str, block: nn.Module) -> list[Unit] | None:
    """The units of a block, of a known class; None if it is none, or changes the shape."""
    return SPLITS[_class_of(block)](path, block) if is_known(block) else None


def is_known(block: nn.Module | None) -> bool:
    """Whether it is a residual block of a known class."""
    return _class_of(block) in SPLITS


def _class_of(block: nn.Module | None) -> tuple[str, str]:
    return type(block).__module__, type(block).__qualname__
