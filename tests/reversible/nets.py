"""Small networks of the kinds that are known, with nothing at its default."""

import timm
import torch
from support import randomise
from torch import nn
from torchvision.models import convnext, regnet, resnet, swin_transformer, vision_transformer


def resnet_of(block, layers=(1, 3, 4, 1), **kwargs):
    return resnet.ResNet(block, list(layers), num_classes=5, **kwargs)


def torchvision_regnet():
    return regnet.RegNet(regnet.BlockParams([3, 4], [8, 16], [4, 4], [1.0, 1.0], [2, 2], 0.25), num_classes=5)


def torchvision_convnext():
    setting = [convnext.CNBlockConfig(8, 16, 3), convnext.CNBlockConfig(16, None, 2)]
    return convnext.ConvNeXt(setting, stochastic_depth_prob=0.2, layer_scale=0.5, num_classes=5)


def torchvision_vit():
    return vision_transformer.VisionTransformer(32, 8, 3, 4, 16, 32, dropout=0.1, num_classes=5)


def torchvision_swin():
    return swin_transformer.SwinTransformer([4, 4], 8, [2, 4], [2, 4], [4, 4], num_classes=5)


NETS = {
    "torchvision ResNet": lambda: resnet_of(resnet.BasicBlock),
    "torchvision bottlenecks": lambda: resnet_of(resnet.Bottleneck),
    "torchvision ResNeXt": lambda: resnet_of(resnet.Bottleneck, groups=4, width_per_group=8),
    "torchvision RegNet": torchvision_regnet,
    "torchvision ConvNeXt": torchvision_convnext,
    "torchvision ViT": torchvision_vit,
    "torchvision Swin": torchvision_swin,
    "timm ResNet": lambda: timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 3, 4, 1), num_classes=5),
    "timm bottlenecks": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (1, 3, 2, 1), num_classes=5, drop_path_rate=0.1
    ),
    "timm RegNet": lambda: timm.create_model("regnetx_002", num_classes=5),
    "timm ConvNeXt": lambda: timm.models.convnext.ConvNeXt(
        depths=(3, 2, 1, 1), dims=(8, 16, 16, 16), num_classes=5, drop_path_rate=0.1
    ),
    "timm ViT": lambda: timm.models.vision_transformer.VisionTransformer(
        32, 8, embed_dim=16, depth=3, num_heads=4, num_classes=5, init_values=0.5, drop_path_rate=0.1
    ),
    "timm Swin": lambda: timm.models.swin_transformer.SwinTransformer(
        32, 4, embed_dim=8, depths=(2, 3), num_heads=(2, 4), window_size=4, num_classes=5
    ),
}
UNITS = {
    "torchvision ResNet": [2, 3],
    "torchvision bottlenecks": [2, 3],
    "torchvision ResNeXt": [2, 3],
    "torchvision RegNet": [2, 3],
    "torchvision ConvNeXt": [3, 2],
    "torchvision ViT": [6],
    "torchvision Swin": [4, 8],
    "timm ResNet": [2, 3],
    "timm bottlenecks": [2],
    "timm RegNet": [3, 6],
    "timm ConvNeXt": [3, 2],
    "timm ViT": [6],
    "timm Swin": [4, 6],
}
"""How many F each chain has."""


def make(name):
    """In float64, in eval mode, nothing at 0."""
    torch.manual_seed(0)
    net = randomise(NETS[name]()).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def image(size=32, batch=2):
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def mlp(width=6):
    """F of a block that is named by hand."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Residual(nn.Module):
    """x + F(x)."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


def chain_of(count, width=6):
    """So many pre-norm blocks, which loop through themselves."""
    return nn.Sequential(*(Residual(mlp(width)) for _ in range(count))).double()
