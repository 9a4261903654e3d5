"""What is wrong is said at the public boundary, before anything runs."""

import re

import pytest
import torch
from local_learning.networks import flux, images, network, uncompiled, unit
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset
from torchvision.ops import StochasticDepth

from convbn_compile._arguments import num_bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("300MiB", 300 * 2**20),
        ("2GiB", 2**31),
        (" 1.5 gib ", 3 * 2**29),
        ("5kB", 5000),
        ("2 MB", 2 * 10**6),
    ],
)
def test_bytes(value, expected):
    assert num_bytes(value) == expected


BAD = {
    "num_classes": ("ten", TypeError, "num_classes: an integer of 1 or more is needed, got 'ten' (str)."),
    "memory_budget": (0, ValueError, "memory_budget: an integer of 1 or more is needed, got 0 (int)."),
    "batch_size_limit": (0, ValueError, "batch_size_limit: an integer of 1 or more is needed"),
    "similarity": (-0.1, ValueError, "similarity must be 0 or more, and finite, got -0.1."),
    "exit_tolerance": ("0", TypeError, "exit_tolerance must be a number, got '0' (str)."),
    "margin": (1.0, ValueError, "margin must be from 0 to below 1, got 1.0."),
    "head_filters": (0, ValueError, "head_filters: an integer of 1 or more is needed"),
    "cache": ("yes", ValueError, "cache must be one of 'auto', 'always', 'never', got 'yes' (str)."),
    "cache_dtype": (torch.int8, ValueError, "cache_dtype must be one of torch.float32, torch.float16"),
    "optimizer": ("sgd", TypeError, "optimizer must be a function from parameters to an optimizer, got 'sgd' (str)."),
    "lr_batch_size": (0, ValueError, "lr_batch_size: an integer of 1 or more is needed"),
    "seed": (-1, ValueError, "seed must be an integer of 0 or more, got -1 (int)."),
    "options": ({"lowring": "x"}, ValueError, "lowring"),
    "storage": ("", TypeError, "storage must be the path of a folder, got '' (str)."),
}
ALSO_BAD = {
    "options": ("fast", TypeError, 'options must be a mapping, such as {"lowering": "aot_eager"}, got \'fast\' (str).'),
    "memory_budget": ("9" * 400, ValueError, "memory_budget: a number of bytes is needed"),
}


@pytest.mark.parametrize(("name", "bad"), [*BAD.items(), *ALSO_BAD.items()])
def test_arguments(name, bad, tmp_path):
    from convbn_compile.local_learning import NeuroFlux

    value, error, message = bad
    arguments = {"num_classes": 4, "memory_budget": 10**6, "storage": tmp_path, name: value}
    with pytest.raises(error, match=re.escape(message)):
        NeuroFlux(network(), **arguments)


@pytest.mark.parametrize(
    "example", [torch.tensor(1.0), torch.randn(0, 3, 8, 8), torch.randn(2, 3, 8, 8, device="meta")]
)
def test_examples_without_an_image(example, tmp_path):
    with pytest.raises(ValueError, match="example must have an image at least"):
        flux(tmp_path).profile(example)


OPTIMIZERS = {
    "none": (lambda _: None, TypeError, "the function has to return an optimizer of torch.optim, got None (NoneType)."),
    "LBFGS": (torch.optim.LBFGS, ValueError, "optimizer: LBFGS needs a closure"),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizers(case, tmp_path):
    optimizer, error, message = OPTIMIZERS[case]
    with pytest.raises(error, match=re.escape(message)):
        flux(tmp_path, optimizer=optimizer).fit(images(), images(24, 2), 1)


@pytest.mark.parametrize("budget", ["300 apples", "MiB", "-3MiB", "0MiB", "1.2.3MiB", ""])
def test_budgets_in_words(budget, tmp_path):
    message = f'memory_budget: a number of bytes is needed, such as 2**30, "300MiB" or "2GiB", got {budget!r} (str).'
    with pytest.raises(ValueError, match=re.escape(message)):
        flux(tmp_path, memory_budget=budget)


def test_storage_is_a_path():
    with pytest.raises(TypeError, match=re.escape("storage must be the path of a folder, got 3 (int).")):
        flux(3)


def test_a_mode_is_not_an_option(tmp_path):
    with pytest.raises(ValueError, match="mode"):
        flux(tmp_path, options={"mode": "tune"})


def test_plan_needs_a_profile(tmp_path):
    with pytest.raises(ValueError, match=re.escape("plan needs a profile: call profile(example) before")):
        flux(tmp_path).plan()


@pytest.mark.parametrize("call", [lambda run: run.exits(), lambda run: run.export()])
def test_exits_need_fit(call, tmp_path):
    with pytest.raises(ValueError, match=re.escape("There are no exits yet: call fit(train, val, epochs) before.")):
        call(flux(tmp_path))


def test_exits_that_are_not_there(tmp_path):
    from local_learning.networks import fitted

    run = fitted(tmp_path, epochs=1)
    for wrong in ("first", 3, True, -1):
        with pytest.raises(ValueError, match=re.escape("exit must be \"best\", \"last\", or one of ['0', '1', '2']")):
            run.export(wrong)


def labelled(low, high):
    x, target = images()[:]
    return TensorDataset(x, target.clamp(low, high))


class Iterable(IterableDataset):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(())


DATA = {
    "no dataset": (3, TypeError, "train: a dataset with a length and items is needed"),
    "an iterator": (iter([]), TypeError, "train: a dataset with a length and items is needed"),
    "empty": ([], ValueError, "train: the dataset is empty."),
    "an iterable one": (Iterable(), TypeError, "train: a dataset with a length and items is needed"),
    "a mapping": ({"a": 1}, ValueError, "loading the first of it: KeyError: 0"),
    "of other things": ([("image", 0)] * 8, ValueError, "train: the dataset has to be one of pairs"),
    "of images of two sizes": (
        [(torch.randn(3, 8, 8 + index), 0) for index in range(8)],
        ValueError,
        "an image, as a tensor of the same shape as all others",
    ),
    "no pairs": (TensorDataset(torch.randn(8, 3, 8, 8)), ValueError, "train: the dataset has to be one of pairs"),
    "a class too many": (
        TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8)),
        ValueError,
        "train: classes have to be integers from 0 to num_classes - 1 = 3",
    ),
    "a negative class": (
        TensorDataset(torch.randn(8, 3, 8, 8), -torch.ones(8, dtype=torch.int64)),
        ValueError,
        "got -1 to -1 in torch.int64 of shape [",
    ),
    "classes that are no integers": (
        TensorDataset(torch.randn(8, 3, 8, 8), torch.rand(8)),
        ValueError,
        "in torch.float32 of shape [",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_datasets(case, tmp_path):
    data, error, message = DATA[case]
    run = flux(tmp_path, memory_budget="1MiB")
    with uncompiled(), pytest.raises(error, match=re.escape(message)):
        run.fit(data, images(24, 2), 1, progress=False)


def test_which_dataset_is_wrong(tmp_path):
    x, target = images(24, 2)[:]
    with (
        uncompiled(),
        pytest.raises(ValueError, match="val: classes have to be integers from 0 to num_classes - 1 = 3"),
    ):
        flux(tmp_path).fit(images(), TensorDataset(x, target + 1), 1, progress=False)


class Cast(nn.Module):
    def forward(self, x):
        return x.double()


def test_a_network_of_two_dtypes(tmp_path):
    first, second, third, head = network()
    modules = [nn.Sequential(first, Cast()), second.double(), third.double(), head.double()]
    with pytest.raises(ValueError, match=r"unit 0 returns torch.float64; a network has to be of one dtype, here"):
        flux(tmp_path, modules).profile(images()[:2][0])


def test_a_classifier_that_does_not_take_its_input(tmp_path):
    *modules, _ = network()
    with pytest.raises(ValueError, match="^the classifier: "):
        flux(tmp_path, [*modules, nn.Linear(7, 4)]).profile(images()[:2][0])


@pytest.mark.parametrize("epochs", [0, 1.5, True])
def test_epochs(epochs, tmp_path):
    with pytest.raises((TypeError, ValueError), match=re.escape("epochs: an integer of 1 or more is needed")):
        flux(tmp_path).fit(images(), images(), epochs)


def test_a_budget_that_nothing_fits_into(tmp_path):
    run = flux(tmp_path, memory_budget=30_000)
    with (
        uncompiled(),
        pytest.raises(ValueError, match=r"memory_budget: unit \d does not fit into 0.03 MiB with a single image"),
    ):
        run.fit(images(), images(24, 2), 1, progress=False)
    assert not list(tmp_path.glob("[!.]*"))


def test_images_of_two_shapes(tmp_path):
    val = TensorDataset(torch.randn(8, 3, 10, 10), torch.zeros(8, dtype=torch.int64))
    message = "val: its images have the shape [3, 10, 10], those of train [3, 8, 8]."
    with pytest.raises(ValueError, match=re.escape(message)):
        flux(tmp_path).fit(images(), val, 1)


def test_a_batch_that_batch_norm_does_not_take(tmp_path):
    """One image, one pixel."""
    run = flux(tmp_path, [unit(3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(8, 4))], memory_budget="1MiB")
    with uncompiled(), pytest.raises(ValueError, match="unit 0: a step of training fails: Expected more than 1 value"):
        run.fit(images(1), images(24, 2), 1, progress=False)
    assert not list(tmp_path.glob("[!.]*"))


def test_nothing_to_train(tmp_path):
    modules = network()
    for module in modules[2:]:
        module.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="unit 2: it and its head have no parameter that requires a gradient"):
        flux(tmp_path, modules).profile(images()[:2][0])


def test_a_device_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="device must be one that is there, such as \"cuda:0\", got 'gpu'"):
        flux(tmp_path, device="gpu")
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, whose bytes can be told, got 'meta'"):
        flux(tmp_path, device="meta")


SHARED = [
    (nn.Dropout(0.5), "Dropout"),
    (nn.RReLU(), "RReLU"),
    (StochasticDepth(0.5, "row"), "StochasticDepth"),
    (nn.BatchNorm2d(8, affine=False), "buffer"),
    (nn.ReLU(), None),
]


@pytest.mark.parametrize(("shared", "what"), SHARED)
def test_modules_of_two_units(shared, what, tmp_path):
    first, second, third, head = network()
    modules = [nn.Sequential(first, shared), nn.Sequential(second, shared), third, head]
    if what is None:
        flux(tmp_path, modules)
        return
    with pytest.raises(ValueError, match=f"1 and 0 share a {what}, and are not trained at the same time"):
        flux(tmp_path, modules)
