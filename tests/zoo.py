"""Real ConvBN models of timm, torchvision and transformers, in float64 against eager, norm by norm; `make zoo`.

    python tests/zoo.py --out docs/zoo.md            all of them
    python tests/zoo.py resnet18 levit_128s          some

Random weights, batch norm statistics and affine parameters that no default hides, small inputs, lowering="aot_eager".
Two images, because F.batch_norm's own backward is wrong on the CPU for one whose gradient is transposed (torch 2.13).
Right means: output and every gradient as eager's, to 1e-8 relative; and every norm that is called, as counted by a
TorchDispatchMode in an eager run, is folded or left alone with a reason. Where eager itself is further than 1e-8 from
the same graph without folds (its kernels for hard-swish take 1/6 in float32), the fold is judged against that graph.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support import compiled, counted, difference, magnitude, randomise
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from convbn_compile import freeze_batch_norm
from convbn_compile._torch import BatchNormModule
from convbn_compile.models import declare_torchvision_operators

declare_torchvision_operators()

TOLERANCE = 1e-8

TIMM = tuple(
    """
    halonet_h1 test_byobnet convmixer_768_32 cpubone_nano cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c dpn48b
    efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
    fasternet_t0 fastvit_t8 ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_coatnet
    mobilenetv3_small_050 mobilevit_xxs nasnetalarge nextvit_small pnasnet5large regnetx_002 repghostnet_050 repvit_m0_9
    res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18
    starnet_s050 swiftformer_xs tiny_vit_5m_224 tresnet_m vgg11_bn visformer_tiny repvgg_a0 mobileone_s0 convnext_atto
    """.split()  # noqa: SIM905
)
TORCHVISION = tuple(
    """
    resnet18 mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 regnet_y_400mf maxvit_t
    googlenet wide_resnet50_2
    """.split()  # noqa: SIM905
)
VIDEO = ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to make it and what to call it with."""

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]] | None = None
    training: bool = True  # besides batch norm and what draws numbers: some models cache things in eval mode


@dataclass
class Row:
    """What was found of one model."""

    library: str
    name: str
    norms: int = 0
    folded: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    by_hand: int = 0
    merged: int = 0
    output: float = float("nan")
    gradients: float = float("nan")
    against: str = "eager"
    seconds: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        """Numbers as eager's, and no norm without a line."""
        counted_all = self.norms == self.folded + sum(self.refused.values())
        return not self.failure and counted_all and max(self.output, self.gradients) <= TOLERANCE

    def cells(self) -> list[Any]:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.refused.items()) or self.failure
        errors = [f"{error:.0e}" for error in (self.output, self.gradients)]
        verdict = "yes" if self.right else "**no**"
        return [
            self.library,
            self.name,
            self.norms,
            self.folded,
            self.by_hand or "",
            self.merged or "",
            reasons,
            *errors,
            self.against,
            verdict,
        ]


FIRST, LAST = ["library", "model", "norms", "folded", "by hand"], ["output", "gradients", "against", "right"]
HEADERS = [*FIRST, "merged", "left alone", *LAST]


class CountNorms(TorchDispatchMode):
    """Counts the batch norms that run, whatever they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in func.name() and "backward" not in func.name():
            self.norms += 1
        return func(*args, **(kwargs or {}))


def timm_model(name: str) -> Entry:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return Entry("timm", name, make)


def torchvision_model(name: str) -> Entry:
    def make() -> nn.Module:
        import torchvision

        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, **options)

    return Entry("torchvision", name, make)


def video_model(name: str) -> Entry:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    shape = (14, 224, 224) if name == "s3d" else (4, 32, 32)
    return Entry("torchvision", name, make, lambda _: {"args": (random(1, 3, *shape),)})


def segmentation(name: str) -> Entry:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, weights_backbone=None)

    return Entry("torchvision", name, make)


def frozen_backbone() -> nn.Module:
    """Detection's: ResNet-18 and FPN with FrozenBatchNorm2d, its statistics and affine not default."""
    import torchvision
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    model = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    del torchvision
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def ssdlite_backbone() -> nn.Module:
    import torchvision

    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def pixels(_: nn.Module) -> dict[str, Any]:
    return {"kwargs": {"pixel_values": random(2, 3, 64, 64)}}


def transformers_model(name: str, kind: str, inputs: Any = pixels, **config: Any) -> Entry:
    """A model from its configuration alone: `kind` is the prefix of its Config and Model classes."""

    def make() -> nn.Module:
        import transformers

        found = getattr(transformers, f"{kind}Config")(**config)
        return getattr(transformers, f"{kind}Model")(found)

    # in training mode some look for infinities, which breaks the graph, and one graph then serves many modules
    return Entry("transformers", name, make, inputs, training=kind == "Levit")


class FastSpeech2(nn.Module):
    """The encoder and the postnet: what is between them repeats each token as often as its values say, in float32."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.FastSpeech2ConformerConfig(hidden_size=32, encoder_layers=1, decoder_layers=1)
        model = transformers.FastSpeech2ConformerModel(config)
        self.encoder, self.postnet = model.encoder, model.speech_decoder_postnet

    def forward(self, tokens: Tensor) -> Tensor:
        return self.postnet(self.encoder(tokens)[0])


def tokens(_: nn.Module) -> dict[str, Any]:
    return {"args": (torch.arange(24).reshape(2, 12) % 7 + 1,)}


def speech(_: nn.Module) -> dict[str, Any]:
    return {"args": (random(2, 4000).detach(),)}


TRANSFORMERS = [
    transformers_model("resnet", "ResNet", depths=[1, 1, 1, 1], layer_type="basic", hidden_sizes=[16, 32, 64, 128]),
    transformers_model("regnet", "RegNet", depths=[1, 1, 2, 1], hidden_sizes=[32, 64, 128, 256], groups_width=16),
    transformers_model("mobilenet_v1", "MobileNetV1"),
    transformers_model("mobilenet_v2", "MobileNetV2"),
    transformers_model("efficientnet", "EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    transformers_model("levit", "Levit", image_size=64, hidden_sizes=[64, 96, 128], num_attention_heads=[2, 3, 4]),
    transformers_model("mobilevit", "MobileViT", image_size=64),
    transformers_model("mobilevitv2", "MobileViTV2", image_size=64),
    transformers_model("cvt", "Cvt"),
    transformers_model("swiftformer", "SwiftFormer"),
    transformers_model("textnet", "TextNet"),
    transformers_model(
        "detr",
        "Detr",
        num_queries=10,
        encoder_layers=1,
        decoder_layers=1,
        d_model=64,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        backbone_config={
            "model_type": "resnet",
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "hidden_sizes": [16, 32, 64, 128],
            "out_features": ["stage4"],
        },
    ),
    transformers_model("rt_detr", "RTDetr", num_queries=20, encoder_layers=1, decoder_layers=1, anchor_image_size=None),
    transformers_model("d_fine", "DFine", num_queries=20, encoder_layers=1, decoder_layers=1, anchor_image_size=None),
    transformers_model(
        "wav2vec2_conformer", "Wav2Vec2Conformer", speech, num_hidden_layers=2, hidden_size=64, num_attention_heads=4
    ),
    Entry("transformers", "fastspeech2_conformer", FastSpeech2, tokens, training=False),
]


def zoo() -> list[Entry]:
    """Every model, by library."""
    return [
        *map(timm_model, TIMM),
        *map(torchvision_model, TORCHVISION),
        *map(video_model, VIDEO),
        *map(segmentation, ["lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"]),
        Entry("torchvision", "resnet18_fpn", frozen_backbone),
        Entry("torchvision", "ssdlite320 backbone", ssdlite_backbone),
        *TRANSFORMERS,
    ]


def examine(entry: Entry) -> Row:
    """Make the model, run it eagerly and compiled, and compare."""
    row, start = Row(entry.library, entry.name), time.perf_counter()
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        _compare(entry, row)
    except Exception as error:  # noqa: BLE001  one model's failure is a line of the table
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row.seconds = time.perf_counter() - start
    gc.collect()
    return row


def _compare(entry: Entry, row: Row) -> None:
    model = randomise(entry.make().double())
    model = _without_chance(model) if entry.training else model
    inputs = (entry.inputs or _images)(model)
    _calibrate(model, inputs)
    with CountNorms() as oracle, torch.no_grad():
        _call(model, inputs)
    row.norms = oracle.norms
    eager = _run(model, model, inputs)
    with warnings.catch_warnings(), counted() as counts:
        warnings.filterwarnings("ignore", message="convbn_tune folded no batch norm")
        tuned = _run(compiled(model, fold="always"), model, inputs)
    norms = [item for item in counts.rewrites if item.kind == "batch norm"]
    row.folded, row.by_hand = len(norms), sum(item.kind == "affine" for item in counts.rewrites)
    row.merged = counts.merged
    for refusal in counts.refused:
        if refusal.kind == "batch norm":
            row.refused[refusal.reason] = row.refused.get(refusal.reason, 0) + 1
    row.output, row.gradients = _errors(tuned, eager)
    if max(row.output, row.gradients) > TOLERANCE:
        torch._dynamo.reset()
        plain = _run(compiled(model, mode="eval"), model, inputs)
        row.output, row.gradients = _errors(tuned, plain)
        row.against = f"unfolded, {max(_errors(plain, eager)):.0e} from eager"


def _without_chance(model: nn.Module) -> nn.Module:
    """In training mode, as fine-tuned, but for batch norm and what draws numbers."""
    freeze = any(isinstance(module, BatchNormModule) for module in model.modules())
    model = (freeze_batch_norm(model) if freeze else model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or hasattr(module, "drop_prob"):
            module.eval()
        if isinstance(getattr(module, "drop_rate", None), float):
            module.drop_rate = 0.0
    return model


def _calibrate(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Statistics near those of the data, so that values stay in range however deep the model is, but not equal."""

    def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1)
        module.running_mean.copy_(values.mean(1) + 0.3 * torch.randn(len(values)))
        module.running_var.copy_(values.var(1, correction=0) * (0.5 + torch.rand(len(values))) + 0.1)

    norms = [module for module in model.modules() if isinstance(module, BatchNormModule)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        _call(model, inputs)
    for hook in hooks:
        hook.remove()


def _images(model: nn.Module) -> dict[str, Any]:
    """Images as small as the model takes."""
    config = getattr(model, "default_cfg", {})
    native = config.get("input_size", (3, 224, 224))[-1]
    for size in dict.fromkeys((64, 128, native)):
        inputs = {"args": (random(2, 3, size, size),)}
        try:
            with torch.no_grad():
                _call(model, inputs)
        except (RuntimeError, AssertionError, ValueError):
            continue
        return inputs
    raise ValueError(f"no image size suits it, {native} included")


def _call(function: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    found = function(*inputs.get("args", ()), **inputs.get("kwargs", {}))
    leaves = tree_leaves(dict(found) if hasattr(found, "keys") else found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _run(function: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> list[list[Tensor | None]]:
    """Outputs, and gradients of every parameter and input."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    leaves = [leaf for leaf in (*model.parameters(), *tensors) if leaf.requires_grad]
    torch.manual_seed(1)
    outputs = _call(function, inputs)
    generator = torch.Generator().manual_seed(2)
    terms = [(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs]
    loss = sum(term for term in terms if term.requires_grad)
    return [[output.detach() for output in outputs], list(torch.autograd.grad(loss, leaves, allow_unused=True))]


def _errors(found: list[list[Tensor | None]], wanted: list[list[Tensor | None]]) -> tuple[float, float]:
    """Largest relative error of an output and of a gradient; None must meet None.

    A gradient that is 0 but for rounding, as that of a bias that softmax does not see, is taken by the largest of all.
    """
    worst = [0.0, 0.0]
    for index, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        largest = max((magnitude(tensor) for tensor in theirs if tensor is not None), default=1)
        for got, want in zip(mine, theirs, strict=True):
            if (got is None) != (want is None):
                raise AssertionError("a gradient that eager has is missing, or the other way round")
            if got is not None and want is not None:
                error = difference(got, want) / max(magnitude(want), 1e-6 * largest, 1e-300)
                worst[index] = max(worst[index], error)
    return worst[0], worst[1]


def page(rows: list[Row]) -> str:
    """docs/zoo.md."""
    import timm
    import torchvision
    import transformers

    versions = {"torch": torch, "timm": timm, "torchvision": torchvision, "transformers": transformers}
    named = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    right = sum(row.right for row in rows)
    norms, folded = sum(row.norms for row in rows), sum(row.folded for row in rows)
    table = tabulate([row.cells() for row in rows], headers=HEADERS, tablefmt="pipe")
    by_hand, merged = (sum(getattr(row, name) for row in rows) for name in ("by_hand", "merged"))
    return f"""# The zoo

`make zoo` runs {len(rows)} real models with random weights and batch norms that are never default, in float64, and
compares output and every gradient with eager: {right} of {len(rows)} are right. Of {norms} batch norms, counted
independently in an eager run, {folded} are folded; each of the others has a reason. {by_hand} norms and scales written
by hand are folded, too, and {merged} convolutions merged into others. {named}; Python {platform.python_version()}, CPU.

Errors are relative, the largest of all outputs and of all gradients. `lowering="aot_eager"`, inputs as small as a model
takes, `fold="always"`, because what pays depends on the sizes. *Against*: where eager itself differs from the same
graph without folds by more than {TOLERANCE:.0e}, because its kernels for the gradients of hard-swish and hard-sigmoid
take 1/6 in float32, the fold is compared with that graph.

{table}
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to examine; all if none is given")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    chosen = [entry for entry in zoo() if not arguments.names or entry.name in arguments.names]
    rows = []
    for entry in (progress := tqdm(chosen)):
        progress.set_description(entry.name)
        row = examine(entry)
        rows.append(row)
        if not row.right:
            progress.write(f"{row.name}: {row.cells()} {row.failure}")
    print(tabulate([[*row.cells(), f"{row.seconds:.0f}"] for row in rows], headers=[*HEADERS, "s"]))
    if arguments.out:
        arguments.out.write_text(page(rows))


if __name__ == "__main__":
    main()
