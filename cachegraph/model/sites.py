"""Find the sites of a traced graph from its structure alone.

A site is the branch of a residual add. No class or module name is looked at, so a model that was
never seen before works as well as a known one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from cachegraph.spec import TensorSpec

from .folding import find_folding
from .site import Site, SiteKind, SiteValue
from .streams import inner_of, tokens_of
from .structure import (
    ADDED_PRODUCTS,
    ATTENTION,
    CARRIED,
    CASTS,
    CONVOLUTIONS,
    PIECES,
    PRODUCTS,
    VIEWS,
    Dependence,
    aten,
    common_module,
    enclosing_module,
    module_stack,
    output_module,
    shape_of,
    strip,
    summed,
    summed_product,
    unscaled,
)


@dataclass
class _Branch:
    """The right-hand side of a residual add: ``source + branch``."""

    source: fx.Node
    value: fx.Node
    cores: tuple[fx.Node, ...]
    linears: tuple[fx.Node, ...]
    adds: tuple[fx.Node, ...]  # the residual adds it ends in
    sources: set[fx.Node] = field(default_factory=set)


def find_sites(graph: fx.Graph) -> tuple[Site, ...]:
    """The sites of a traced graph in the order of their execution.

    Args:
        graph: functional, with ``meta["val"]`` and ``meta["nn_module_stack"]`` on its nodes.
    """
    dependence = Dependence(graph)
    merged: list[_Branch] = []
    for branch in _branches(dependence):
        _merge(merged, branch)
    merged.sort(key=lambda b: dependence.index[b.value])
    groups: list[list[_Branch]] = []
    for branch in merged:  # branches with the same cores are one site with several values
        twin = next((g for g in groups if branch.cores and g[0].cores == branch.cores), None)
        groups.append([branch]) if twin is None else twin.append(branch)
    sites = tuple(_site(dependence, group) for group in groups)
    return _with_unique_names(sites)


def _merge(merged: list[_Branch], branch: _Branch) -> None:
    for known in merged:
        if known.value is branch.value:
            known.adds += branch.adds
            known.sources |= branch.sources
            return
    merged.append(branch)


def _branches(dependence: Dependence) -> Iterator[_Branch]:
    residual: dict[fx.Node, fx.Node] = {}  # residual add -> its source
    sited: set[fx.Node] = set()  # residual adds whose branch is a site
    for node in dependence.nodes:
        pair = _residual(dependence, node, residual)
        if pair is None:
            continue
        source, end = pair
        residual[node] = source
        source = _latest(residual, sited, source, dependence.between(source, end))
        for value in _kept(dependence, source, end):
            branch = _classify(dependence, source, value, node)
            if branch is not None:
                sited.add(node)
                yield branch


def _latest(
    residual: dict[fx.Node, fx.Node],
    sited: set[fx.Node],
    source: fx.Node,
    region: list[fx.Node],
) -> fx.Node:
    """The last residual add in the region, which the branch then starts from.

    It is one of the source's own chain, ``x + f(h), h = x + g(x)``, or one whose branch is a site
    (an outer skip over whole blocks). Any other is a part of this branch: ``y + conv(y)`` at its
    end, the cubic term of a written-out gelu.
    """
    chain = {source}
    for node in region:
        if node in sited or residual.get(node) in chain:
            chain.add(node)
            source = node
    return source


def _residual(
    dependence: Dependence, node: fx.Node, residual: dict[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """(source, end of the branch) where the node is a residual add."""
    terms = [t for t in summed(node) if shape_of(t) == shape_of(node)]
    if len(terms) < 2 or dependence.is_constant(node):
        return None
    pairs = [(one, other) for one in terms for other in terms if one is not other]
    # A stream that was scaled on its way counts where nothing else does: ``0.8 * x + 0.6 * f(x)``.
    for carried in (lambda n: strip(n, CARRIED), unscaled):
        for one, branch in pairs:
            source = carried(one)
            if source is not branch and dependence.depends(branch, source):
                return source, branch
    for one, branch in pairs:
        known = residual.get(strip(one, CARRIED))
        if known is not None and dependence.depends(branch, known):
            return known, branch
    return None


def _kept(dependence: Dependence, source: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """Walk back from the end of a branch to what is kept: before gate, casts, pieces and views."""
    node = strip(node, VIEWS | CASTS | PIECES)
    if node is source or not dependence.depends(node, source):
        return ()
    operands = node.all_input_nodes
    working = [a for a in operands if _works(dependence, source, a)]
    gate = _gate(dependence, source, node)
    if gate is not None and not _routes(dependence, source, node, gate):
        return _kept(dependence, source, working[0])
    adds = node.target is aten.add.Tensor and _independent(dependence, working)
    if adds and not _is_mixture(dependence, source, node):
        # x + (attn(x) + mlp(x)): two sites
        return tuple(n for a in working for n in _kept(dependence, source, a))
    if node.target is aten.cat.default:  # pieces that got gates of their own
        joined = {_kept(dependence, source, a) for a in operands}
        if len(joined) == 1 and len(pieces := joined.pop()) == 1:
            return pieces
    return (node,)


def _gate(dependence: Dependence, source: fx.Node, node: fx.Node) -> fx.Node | None:
    """What the working part of a branch is multiplied with, where the node does that."""
    operands = node.all_input_nodes
    working = [a for a in operands if _works(dependence, source, a)]
    if node.target is not aten.mul.Tensor or len(operands) != 2 or len(working) != 1:
        return None
    gate = operands[0] if operands[1] is working[0] else operands[1]
    return None if dependence.is_constant(gate) else gate


def _routes(dependence: Dependence, source: fx.Node, node: fx.Node, gate: fx.Node) -> bool:
    """True where every token of the stream has a factor of its own: that is no gate but routing.

    What is kept then holds the factor, or an old value would meet the new one.
    """
    tokens, factors = shape_of(node)[1:-1], shape_of(gate)[1:-1]
    return dependence.depends(gate, source) and tokens == factors and set(tokens) != {"1"}


def _is_mixture(dependence: Dependence, source: fx.Node, node: fx.Node) -> bool:
    """True for a sum of experts, each with a factor that the stream decides: it is one site."""
    if _cores(dependence, dependence.between(source, node)):
        return False
    parts = [node]
    while parts:
        part = strip(parts.pop(), VIEWS | CASTS)
        gate = _gate(dependence, source, part)
        if gate is not None and dependence.depends(gate, source):
            return True
        if part.target is aten.add.Tensor:
            parts += part.all_input_nodes
    return False


def _independent(dependence: Dependence, nodes: Sequence[fx.Node]) -> bool:
    return len(nodes) == 2 and not (
        dependence.depends(nodes[0], nodes[1]) or dependence.depends(nodes[1], nodes[0])
    )


def _works(dependence: Dependence, source: fx.Node, node: fx.Node) -> bool:
    """True where the node's part of the region does a site's main work."""
    return _classify(dependence, source, node, node) is not None


def _classify(
    dependence: Dependence, source: fx.Node, value: fx.Node, add: fx.Node
) -> _Branch | None:
    if value is source or not dependence.depends(value, source):
        return None
    region = dependence.between(source, value)
    cores = _cores(dependence, region)
    linears = tuple(n for n in region if _is_linear(dependence, n))
    if not cores and not _in_series(dependence, linears):
        return None
    value = _module_output(dependence, source, value, (*cores, *linears))
    return _Branch(source, value, cores, linears, (add,), {source})


def _module_output(
    dependence: Dependence, source: fx.Node, value: fx.Node, anchors: Sequence[fx.Node]
) -> fx.Node:
    """The module's own output where a norm behind it made the value (Mochi, Z-Image).

    Reusing what the module returned is what hooks on modules do, and it is as exact: the norm runs
    on the reused value.
    """
    module = enclosing_module(set(anchors), [])
    if module is None or (output_module(value) is not None and module in module_stack(value)):
        return value
    last = max(anchors, key=dependence.index.__getitem__)
    if last is value or not _is_linear(dependence, last):
        return value
    region = set(dependence.between(source, value))
    for node in dependence.between(last, value):  # does anything pass the projection by?
        for a in node.all_input_nodes:
            if a in region and a is not last and not dependence.depends(a, last):
                return value
    return last


def _in_series(dependence: Dependence, linears: Sequence[fx.Node]) -> bool:
    return any(dependence.depends(b, a) for i, b in enumerate(linears) for a in linears[:i])


def _cores(dependence: Dependence, region: list[fx.Node]) -> tuple[fx.Node, ...]:
    """Attention cores: SDPA, or two products of activations in series (with or without softmax)."""
    whole = [n for n in region if n.target in ATTENTION or str(n.target) == "flex_attention"]
    products = [n for n in region if _mixes(dependence, n)]
    if not _in_series(dependence, products):
        products = []
    return tuple(sorted([*whole, *products], key=dependence.index.__getitem__))


def _mixes(dependence: Dependence, node: fx.Node) -> bool:
    """True for a product of two activations of rank 3 or more, be it written as a sum."""
    product = summed_product(node)
    if product is None and node.target not in PRODUCTS:
        return False
    factors = product or [n for n in node.all_input_nodes if not dependence.is_constant(n)]
    return (
        len(shape_of(factors[0] if product else node)) >= 3
        and len([n for n in factors if not dependence.is_constant(n)]) >= 2
    )


def _is_linear(dependence: Dependence, node: fx.Node) -> bool:
    if node.target is aten.linear.default or node.target in CONVOLUTIONS:
        return True
    return node.target in PRODUCTS and any(dependence.is_constant(n) for n in node.all_input_nodes)


def _site(dependence: Dependence, group: list[_Branch]) -> Site:
    anchors = {n for branch in group for n in (*branch.cores, *branch.linears)}
    adds = [add for branch in group for add in branch.adds]
    kind = _kind(dependence, group)
    joined = [
        inner for branch in group for inner in inner_of(dependence, branch.cores, branch.linears)
    ]
    module = enclosing_module(anchors, adds)
    block = common_module([*anchors, *adds])
    return Site(
        name=module if module is not None else f"{block}:{kind.value}" if block else kind.value,
        kind=kind,
        values=tuple(_value(dependence, branch) for branch in group),
        module=module,
        source=group[0].source.name,
        reader=_reader(dependence, group[0]),
        residual=adds[-1].name,
        cores=tuple(n.name for n in group[0].cores),
        anchors=tuple(n.name for n in sorted(anchors, key=dependence.index.__getitem__)),
        fused=bool(joined),
        inner=joined[0] if len(group) == len(joined) == 1 else None,
    )


def _value(dependence: Dependence, branch: _Branch) -> SiteValue:
    node = branch.value
    return SiteValue(
        node=node.name,
        spec=TensorSpec.of(node.meta["val"]),
        module=output_module(node),
        residual=branch.adds[-1].name,
        tokens=tokens_of(dependence, branch.cores, node),
        folding=find_folding(node) if branch.cores else None,
    )


def _reader(dependence: Dependence, branch: _Branch) -> str | None:
    """The innermost module that takes the stream as its input."""
    for node in dependence.between(branch.source, branch.value):
        if branch.source in node.all_input_nodes and (stack := module_stack(node)):
            return stack[-1]
    return None


def _kind(dependence: Dependence, group: list[_Branch]) -> SiteKind:
    if not group[0].cores:
        return SiteKind.MLP
    if len({source for branch in group for source in branch.sources}) > 1:
        return SiteKind.ATTN  # joint attention of two streams
    source = group[0].source
    for core in group[0].cores:
        # Of a product that something is added to, that is no factor.
        given = core.args[1:3] if core.target in ADDED_PRODUCTS else core.args[:3]
        factors = [a for a in given if isinstance(a, fx.Node)]
        if any(not dependence.depends(a, source) for a in factors):
            return SiteKind.CROSS_ATTN
    return SiteKind.ATTN


def _with_unique_names(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Number sites of one name, and the calls of a module that serves several: ``ff``, ``ff@1``."""
    names: Counter[str] = Counter()
    calls: Counter[tuple[str | None, ...]] = Counter()
    named = []
    for site in sites:
        modules = tuple(value.module for value in site.values)
        number, call = names[site.name], calls[modules]
        names[site.name] += 1
        calls[modules] += 1
        named.append(
            replace(site, name=f"{site.name}@{number}" if number else site.name, call=call)
        )
    return tuple(named)
