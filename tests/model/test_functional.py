"""Composite operators are resolved here as torch does it, which traces the model anew for it."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cachegraph.model import functional

Forward = Callable[[Tensor], Tensor]


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return first + second.chunk(2, dim=1)[0].repeat(1, 2, 1)


def _first_part(x: Tensor) -> Tensor:
    return x[:, :4].chunk(2, 1)[1]


FORWARDS: dict[str, Forward] = {
    "a view": lambda x: x.reshape(x.shape[0], 2, 2, 6) + 1,
    "a view of as many as are left": lambda x: x.reshape(x.shape[0], -1) + 1,
    "a copy": lambda x: x.transpose(1, 2).reshape(x.shape[0], 24) + 1,
    "a copy of as many as are left": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1) + 1,
    "a batch that is flattened": lambda x: x.reshape(-1, 6) + 1,
    "flattened": lambda x: x.flatten(1) + x.reshape(x.shape[0], 24),
    "flattened out of order": lambda x: x.transpose(1, 2).flatten(1) + x.view(x.shape[0], 24),
    "unflattened": lambda x: x.unflatten(2, (2, 3)) + x.view(x.shape[0], 4, 2, 3),
    "a size that nothing else asks for": lambda x: x.flatten(1) + 1,
    "halves": _halves,
    "halves of a slice": _first_part,
    "a cast": lambda x: x.to(torch.float64) * 2,
    "a cast to what is there": lambda x: x.to(torch.float32) * 2,
    "in order": lambda x: x.transpose(1, 2).contiguous() * 2,
    "in order already": lambda x: x.contiguous() * 2,
    "not used": lambda x: (x.reshape(x.shape[0], -1), x.to(torch.float64), x * 2)[2],
    "written in place": lambda x: x.clone().mul_(2).reshape(x.shape[0], -1),
    "two sizes": lambda x: x.expand(3, -1, -1, -1).reshape(3 * x.shape[0], 24) + 1,
}
TORCHS = {"a size that nothing else asks for", "written in place", "two sizes"}


class _Model(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.call = forward
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _program(forward: Forward) -> ExportedProgram:
    x = torch.zeros(2, 4, 6)
    shapes = ({0: Dim.AUTO},)
    return torch.export.export(_Model(forward), (x,), dynamic_shapes=shapes, strict=False)


def _nodes(program: ExportedProgram) -> list[tuple[str, ...]]:
    """Every node, its arguments by place: names differ."""
    nodes = list(functional.functional(program)[1].graph.nodes)
    checks = torch.ops.aten._assert_tensor_metadata.default  # written in two ways, and left out
    place = {node: f"%{i}" for i, node in enumerate(n for n in nodes if n.target is not checks)}
    found = []
    for node in place:
        given = [str(torch.fx.node.map_arg(a, place.__getitem__)) for a in node.args]
        value = node.meta.get("val")
        spec = (str(value.shape), str(value.stride())) if isinstance(value, Tensor) else ()
        found.append((str(node.op), str(node.target), *given, str(node.kwargs), *spec))
    return found


@pytest.mark.parametrize("name", FORWARDS)
def test_as_torch_resolves_it(name: str) -> None:
    with torch.no_grad():
        program = _program(FORWARDS[name])
        with mock.patch.object(functional, "_is_known", return_value=False):
            expected = _nodes(program)
        with mock.patch.object(
            ExportedProgram, "run_decompositions", autospec=True, side_effect=_decomposed
        ) as torchs:
            assert _nodes(program) == expected
    assert bool(torchs.mock_calls) == (name in TORCHS)


_decomposed = ExportedProgram.run_decompositions
