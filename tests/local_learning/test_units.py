"""Units of known networks are the network; what is no list of units is an error."""

import re

import pytest
import timm
import torch
import torchvision
from local_learning.networks import flux, network, unit
from torch import nn

from convbn_compile.local_learning._network import built
from convbn_compile.local_learning._units import units_of

KNOWN = {
    "torchvision vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=10), 8, 64),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 9, 64),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 17, 64),
    "timm vgg11_bn": (lambda: timm.create_model("vgg11_bn", num_classes=10), 8, 224),
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=10, drop_rate=0.1), 9, 64),
    "timm test_resnet": (lambda: timm.create_model("test_resnet", num_classes=10), 5, 64),
}


@pytest.mark.parametrize("name", KNOWN)
def test_units_are_the_network(name):
    build, number, size = KNOWN[name]
    model = build().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean)
    units, x = units_of(model), torch.randn(2, 3, size, size)
    assert len(units.units) == number
    value = x
    with torch.no_grad():
        for each in units.units:
            value = each.module(value)
        assert torch.equal(units.classifier.eval()(value), model(x))
    inside = {
        id(one) for each in (*units.units, units) for one in getattr(each, "module", units.classifier).parameters()
    }
    assert inside == {id(one) for one in model.parameters()}


def test_units_of_vgg_begin_at_convolutions():
    names = [each.name for each in units_of(torchvision.models.vgg11_bn()).units]
    assert names == [f"features.{index}" for index in (0, 4, 8, 11, 15, 18, 22, 25)]


def test_units_of_resnet_are_the_stem_and_blocks():
    names = [each.name for each in units_of(torchvision.models.resnet18()).units]
    assert names == ["stem", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2))]


def test_a_model_whose_forward_is_its_own_is_refused():
    class Twice(torchvision.models.ResNet):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Twice(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    message = "Twice computes something else than its units one after the other"
    with pytest.raises(ValueError, match=message):
        built(units_of(model), torch.randn(2, 3, 64, 64), 10, None, {}, 0)


class Skipping(nn.Sequential):
    def forward(self, x):
        return self[2](self[0](x) + self[1](self[0](x)))


def test_a_sequential_with_another_forward(tmp_path):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    run = flux(tmp_path, Skipping(unit(3, 8), unit(8, 8), head))
    with pytest.raises(ValueError, match="Skipping computes something else than its units one after the other"):
        run.profile(torch.randn(2, 3, 8, 8))


def test_a_module_that_a_sequential_has_twice(tmp_path):
    twice = unit(8, 8)
    with pytest.raises(ValueError, match="2 and 1 share a parameter"):
        flux(tmp_path, nn.Sequential(unit(3, 8), twice, twice, nn.Flatten()))


def test_a_list_of_torch():
    given = units_of(nn.ModuleList(network()))
    assert [unit.name for unit in given.units] == ["0", "1", "2"]


def test_images_that_are_no_numbers():
    """They say nothing about the units."""
    model = torchvision.models.resnet18(num_classes=4)
    assert built(units_of(model), torch.full((2, 3, 64, 64), torch.nan), 4, None, {}, 0).units


def test_building_leaves_modes_as_they_are(tmp_path):
    model = torchvision.models.resnet18(num_classes=4).train()
    model.layer2.eval()
    before = {name: module.training for name, module in model.named_modules()}
    built(units_of(model), torch.randn(2, 3, 64, 64), 4, None, {}, 0)
    assert {name: module.training for name, module in model.named_modules()} == before


WRONG = {
    "no module": (3, TypeError, "model must be an nn.Module or a list of modules, got 3 (int)."),
    "text": ("resnet18", TypeError, "model must be an nn.Module or a list of modules, got 'resnet18' (str)."),
    "unknown": (
        nn.Conv2d(3, 3, 3),
        ValueError,
        "knows the units of VGG and ResNet of torchvision and timm, not those of Conv2d",
    ),
    "one module": ([unit(3, 8)], ValueError, "needs a unit and a classifier at least, got 1 of them."),
    "not all modules": ([unit(3, 8), 4], TypeError, "model[1] must be an nn.Module, got 4 (int)."),
    "nothing to train": (
        [unit(3, 8), nn.MaxPool2d(2), nn.Flatten()],
        ValueError,
        "unit 1 (MaxPool2d) has no parameters, so that its loss would train nothing.",
    ),
    "batch statistics": (
        [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), nn.Flatten()],
        ValueError,
        "unit 0 has a BatchNorm2d without running statistics",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models(case, tmp_path):
    model, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        flux(tmp_path, model)


def test_shared_parameters_are_refused(tmp_path):
    first, second, third, head = network()
    extra = unit(8, 8)
    extra[0].weight = second[0].weight
    with pytest.raises(ValueError, match=re.escape("2 and 1 share a parameter, and are not trained at the same time.")):
        flux(tmp_path, [first, second, extra, third, head])


def test_errors_name_the_unit(tmp_path):
    run = flux(tmp_path, [unit(3, 8), unit(9, 8), nn.Flatten()])
    with pytest.raises(ValueError, match=re.escape("unit 1: ") + ".*9"):
        run.profile(torch.randn(2, 3, 8, 8))


def test_a_unit_that_returns_no_tensor(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x), x

    with pytest.raises(ValueError, match="unit 0 returns tuple; a unit has to return a tensor"):
        flux(tmp_path, [Pair(), nn.Flatten()]).profile(torch.randn(2, 3, 8, 8))


def test_the_classifier_has_num_classes_outputs(tmp_path):
    run = flux(tmp_path, torchvision.models.resnet18(num_classes=7))
    with pytest.raises(ValueError, match=re.escape("num_classes = 4, but the network returns [2, 7] for 2 images")):
        run.profile(torch.randn(2, 3, 32, 32))
