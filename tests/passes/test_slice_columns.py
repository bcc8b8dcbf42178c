"""slice-columns: golden difference, equal bit for bit, what is sliced and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cachegraph.compiler.pipeline import PassReport, rewrite
from cachegraph.graph.step_graph import Stage, StepGraph
from cachegraph.graph.text import difference, graph_text
from cachegraph.passes.slice_columns import SliceColumns
from cachegraph.plan.variant import Variant
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import load_schedule
from tests.models import fora, shared_dit
from tests.tiny import check_golden

Use = Callable[[Tensor], Tensor]


def test_golden(update_golden: bool) -> None:
    _, traced = shared_dit(depth=1)
    texts: dict[str, str] = {}

    def look(step: StepGraph, report: PassReport) -> None:
        if step.variant.name == "variant1":
            texts[report.pass_name] = graph_text(step)

    rewrite(traced, plan_of(load_schedule(fora(3, 3)), traced), on_pass=look)
    change = difference(texts["lower"], texts["slice-columns"], ("before", "after"))
    check_golden("slice_columns", {"a reused block": change}, update_golden)


class Wide(nn.Module):
    """A layer of 12 columns, of which ``use`` takes some."""

    def __init__(self, use: Use, *, bias: bool = True) -> None:
        super().__init__()
        self.use, self.wide = use, nn.Linear(4, 12, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.wide(x))


def exported(model: nn.Module, x: Tensor) -> StepGraph:
    program = torch.export.export(model, (x,)).run_decompositions({})
    module: Any = program.module(check_guards=False)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(tuple(copied[n] for n in node.args[0]))
        elif "_guards" not in str(node.target):
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.eliminate_dead_code()
    variant = Variant("variant0", (0,), (), (), ())
    return StepGraph(fx.GraphModule(module, graph), variant, (), Stage.LOWERED, (), 1)


def first_and_third_of_four(y: Tensor) -> Tensor:
    a, _, c, _ = y.chunk(4, dim=-1)
    return a + c


def neighbours(y: Tensor) -> Tensor:
    _, b, c, _ = y.chunk(4, dim=-1)
    return b * c


def pieces_of_different_sizes(y: Tensor) -> Tensor:
    a, _, c = y.split([2, 7, 3], dim=y.ndim - 1)
    return a.sum() + c


def overlapping_slices(y: Tensor) -> Tensor:
    return y[..., 1:4] + y[..., 2:5] + y[..., -3:]


def before_the_first(y: Tensor) -> Tensor:
    return y[..., -100:-8]


def everything(y: Tensor) -> Tensor:
    a, b, c, d = y.chunk(4, dim=-1)
    return a + b + c + d


def as_a_whole_too(y: Tensor) -> Tensor:
    return y[..., :3] + y.sum()


def another_axis(y: Tensor) -> Tensor:
    return y.chunk(2, dim=0)[0]


@pytest.mark.parametrize(
    ("use", "layers"),
    [
        (first_and_third_of_four, [(0, 3), (6, 9)]),
        (neighbours, [(3, 9)]),
        (pieces_of_different_sizes, [(0, 2), (9, 12)]),
        (overlapping_slices, [(1, 5), (9, 12)]),
        (before_the_first, [(0, 4)]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_live_columns_alone_are_computed(
    use: Use, layers: list[tuple[int, int]], bias: bool
) -> None:
    model, x = Wide(use, bias=bias).eval(), torch.randn(4, 3, 4)
    step = exported(model, x)
    assert SliceColumns().apply(step) == 1
    linears = step.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [n.name.split("_")[-2:] for n in linears] == [[str(a), str(b)] for a, b in layers]
    step.module.recompile()
    # BLAS has kernels of their own for so few columns; equal bits are tested on whole models.
    torch.testing.assert_close(step.module(x)[0], model(x), rtol=1e-6, atol=1e-6)
    whole = model.wide.weight
    for node, (start, stop) in zip(linears, layers, strict=True):
        part = F.linear(x, whole[start:stop])
        assert part.shape[-1] == stop - start
        name: Any = node.args[1]
        rows = getattr(step.module.wide, str(name.target).removeprefix("wide."))
        assert rows.data_ptr() == whole[start].data_ptr()  # a view: nothing is stored twice
    for node in step.graph.nodes:
        if "val" not in node.meta and node.op == "call_function":
            node.meta["val"] = step.shapes.evaluate(node)
    assert SliceColumns().apply(step) == 0


@pytest.mark.parametrize("use", [everything, as_a_whole_too, another_axis])
def test_layers_that_are_used_as_a_whole_are_left_alone(use: Use) -> None:
    step = exported(Wide(use).eval(), torch.randn(4, 3, 4))
    before = [node.name for node in step.graph.nodes]
    assert SliceColumns().apply(step) == 0
    assert [node.name for node in step.graph.nodes] == before
