"""Whether the theorem applies to a region: the operators' own gradients, and the one gradient that all are made of."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from convbn_compile._aten import (
    Adjoint,
    ConvParams,
    Gradients,
    LinearOperator,
    aten,
    before_cast,
    bind,
    convert_element_type,
    value,
)
from convbn_compile._layout import Layout
from convbn_compile._per_channel import Link, upwards
from convbn_compile._region import Product, Region
from convbn_compile.identities.affine_of_linear import Needs
from convbn_compile.identities.sum_of_branches import Branch, Merged, merge
from convbn_compile.report import NoMatch


@dataclass(frozen=True)
class Match:
    """A region that can be folded, and merged if it has more than one branch.

    Attributes:
        region: the region.
        merged: the one operator in its place.
        adjoints: each branch's own gradients; None if there are none, or they stay as they are.
        gradient: g; None if only forward is folded.
        own: from g down to what each adjoint reads.
        products: the region's, and those of g with an affine map of the input itself.
        links: from g down to what each product reads.
        copies: from g down to each multiple of it that is added to the input's gradients, and that addition: what the
            branch that is the input itself does.
        fits: W (*) x can be computed in the operator's dtype; not if that is float16 and the map's is wider.
    """

    region: Region
    merged: Merged
    fits: bool
    adjoints: tuple[Adjoint | None, ...]
    gradient: Node | None = None
    own: tuple[Link | None, ...] = (None,)
    products: tuple[Product, ...] = ()
    links: tuple[Link, ...] = ()
    copies: tuple[tuple[Link, Node], ...] = ()

    @property
    def input_stays(self) -> bool:
        """The branch that is the input itself stays an addition.

        In 16 bits its scale would be rounded for a whole channel, where otherwise only the sum is.
        """
        return None in self.region.branches and value(self.region.first.node).dtype.itemsize < 4

    @property
    def reach_input(self) -> list[bool]:
        """Which branches give their input a gradient; one without adjoints has no scale to go into it."""
        return [adjoint is None or adjoint.grad_input is not None for adjoint in self.adjoints]

    @property
    def needs(self) -> Needs:
        """The gradients that the graph reads."""
        adjoints = self.adjoints
        return Needs(
            input=any(adjoint is not None and adjoint.grad_input is not None for adjoint in adjoints),
            weights=tuple(adjoint is not None and adjoint.grad_weight is not None for adjoint in adjoints),
            biases=tuple(adjoint is not None and adjoint.grad_bias is not None for adjoint in adjoints),
        )


def match(region: Region, gradients: Gradients, written: Collection[Node] = ()) -> Match | NoMatch:
    """The match of a region, or why there is none.

    Args:
        region: what the graph makes of one input by way of linear operators.
        gradients: the nodes that are made of tangents.
        written: the inputs that forward writes to.
    """
    op, output = region.first, region.output
    if not value(op.node).is_floating_point():
        return NoMatch(f"the {op.name} computes in {value(op.node).dtype}")
    if not all(op.params.is_static for op in region.operators):
        return NoMatch(f"the {op.name}'s stride, padding or dilation is computed in the graph")
    merged = _merged(region)
    if isinstance(merged, str):
        return NoMatch(f"the branches cannot be one convolution: {merged}")
    fits = value(op.node).dtype is not torch.float16 or value(output.node).dtype is torch.float16
    alone = len(region.branches) == 1
    if not fits and (not alone or not region.products):
        return NoMatch(f"the {op.name} computes in float16, whose range s . w would leave, and the scale is wider")
    if alone and not region.products:
        return Match(region, merged, fits, (None,))
    if _is_scaled_wider(region):
        dtypes = f"{value(op.node).dtype}, and its output is cast to {value(output.node).dtype} and scaled there"
        return NoMatch(f"the {op.name} computes in {dtypes}: the scale's gradient would lose what that is more exact")
    if any(op.bias is not None and before_cast(op.bias) in written for op in region.operators):
        return NoMatch(f"forward changes the {op.name}'s bias in place, which backward would read")
    return _with_gradients(region, merged, gradients, fits=fits)


def _is_scaled_wider(region: Region) -> bool:
    """True if the output is cast to a wider dtype and stays there: the weight's gradient is rounded, g is not.

    Where the result is narrow again, or the multiplication does the widening, eager's gradient is rounded as much.
    """
    start, *way = region.way
    width = value(start.node).dtype.itemsize
    return way[0].node.target is convert_element_type and all(value(each.node).dtype.itemsize > width for each in way)


def _merged(region: Region) -> Merged | str:
    op = region.first
    if not isinstance(op.params, ConvParams):
        return Merged(op.params, (), ((),))
    return merge([_branch(branch, rank=value(op.weight).dim() - 2) for branch in region.branches])


def _branch(op: LinearOperator | None, *, rank: int) -> Branch:
    if op is None:
        return Branch(None, (1,) * rank)
    assert isinstance(op.params, ConvParams), "a linear layer is a branch alone"
    return Branch(op.params, tuple(value(op.weight).shape[2:]))


def _with_gradients(region: Region, merged: Merged, gradients: Gradients, *, fits: bool) -> Match | NoMatch:
    """The match with whatever of the adjoints of each operator leads to one gradient."""
    choices = [[None] if branch is None else branch.adjoints() or [None] for branch in region.branches]
    for adjoints in itertools.product(*choices):
        given = [adjoint.node for adjoint in adjoints if adjoint is not None]
        if not given and not region.products:
            return Match(region, merged, fits, adjoints, own=(None,) * len(adjoints))
        if len(set(given)) < len(given):
            continue
        common = _common_gradient(region, adjoints, gradients)
        if common is None:
            continue
        own, links = common
        sums = Additions.of([adjoint.grad_input for adjoint in adjoints if adjoint and adjoint.grad_input])
        if sums is None:
            return NoMatch("the gradients that its branches have of their input are not just added")
        head = next(link for link in (*own, *links) if link is not None)
        found = Match(region, merged, fits, adjoints, head.node, own, region.products, links)
        return _with_the_input(found, head, sums, gradients)
    name = region.first.name
    return NoMatch(f"backward reads the {name}'s output with a gradient that is not that of its own backward")


def _with_the_input(found: Match, head: Link, sums: Additions, gradients: Gradients) -> Match:
    """The match with what backward does for the branch that is the input itself.

    Its products are sums over two tensors; they are the merged weight's gradient's if that is computed anyway.
    """
    if None not in found.region.branches or found.input_stays:
        return found
    copies = tuple(
        (link, addition)
        for term, addition in sums.terms()
        for link in _ways(term, found.region.way[0].layout, head, gradients)
    )
    found = replace(found, copies=copies)
    if not any(found.needs.weights) and not found.products:
        return found
    more = [
        (product, link)
        for product in found.region.span.products
        if product.affine.starts == {found.region.first.input}
        for link in _ways(product.gradient, product.affine.layout, head, gradients)
    ]
    products, links = (product for product, _ in more), (link for _, link in more)
    return replace(found, products=(*found.products, *products), links=(*found.links, *links))


def _ways(multiple: Node, layout: Layout, head: Link, gradients: Gradients) -> list[Link]:
    """The way from a gradient to a multiple of it, if there is one."""
    if multiple not in gradients:
        return []
    links = upwards(multiple, layout, gradients)
    return [link for link in links if link.node is head.node and link.layout.same_as(head.layout)]


Own = tuple[Link | None, ...]


def _common_gradient(
    region: Region, adjoints: Sequence[Adjoint | None], gradients: Gradients
) -> tuple[Own, tuple[Link, ...]] | None:
    """The way from the nearest gradient of which all that is read is a multiple; None if there is none."""
    layout = region.way[0].layout
    heads = [(adjoint.grad_output, layout) for adjoint in adjoints if adjoint is not None]
    heads += [(product.gradient, product.affine.layout) for product in region.products]
    chains = [list(upwards(*head, gradients)) for head in heads]
    common = []
    for link in chains[0] if chains else []:
        links = [other for chain in chains for other in chain if other.node is link.node]
        if len(links) == len(chains) and all(other.layout.same_as(link.layout) for other in links):
            common.append(links)
    if all(adjoint is None for adjoint in adjoints):  # then g must lie as the output does
        common = [links for links in common if not links[0].layout.moves]
    if not common:
        return None
    rest = iter(_before_widening(common, value(region.first.node).dtype))
    own = tuple(None if adjoint is None else next(rest) for adjoint in adjoints)
    return own, tuple(rest)


def _before_widening(common: list[list[Link]], dtype: torch.dtype) -> list[Link]:
    """The nearest; or what it is a cast of, if that has the operator's dtype already."""
    nearest, *others = common
    cast = nearest[0].node.target is convert_element_type
    return others[0] if cast and others and value(others[0][0].node).dtype == dtype else nearest


@dataclass(frozen=True)
class Additions:
    """How the gradients that branches have of their input are added: the additions, and all that is added."""

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, terms: Sequence[Node]) -> Additions | None:
        """The additions that all terms go into, alone; None if they do not meet."""
        ways = [list(additions(term)) for term in terms]
        if len(ways) > 1 and not set.intersection(*map(set, ways)):
            return None
        return cls(tuple(dict.fromkeys(node for way in ways for node in way)))

    def terms(self) -> list[tuple[Node, Node]]:
        """All else that is added, each with its addition."""
        found: list[tuple[Node, Node]] = []
        queue = list(filter(is_addition, self.nodes))
        for addition in queue:
            for term in addition.all_input_nodes:
                if term not in self.nodes and is_addition(term) and len(term.users) == 1:
                    queue.append(term)
                elif term not in self.nodes:
                    found.append((term, addition))
        return found


def additions(term: Node) -> Iterator[Node]:
    """The additions that a node, which nothing else reads, goes into one after the other, casts left out."""
    while len(term.users) == 1:
        (term,) = term.users
        if term.target is not convert_element_type and not is_addition(term):
            return
        yield term


def is_addition(node: Node) -> bool:
    """True if a node adds two tensors of its own dtype and shape."""
    if node.target is not aten.add.Tensor or bind(node)["alpha"] != 1 or len(node.all_input_nodes) != 2:
        return False
    facts = [(value(item).shape, value(item).dtype) for item in (node, *node.all_input_nodes)]
    return facts[0] == facts[1] == facts[2]
