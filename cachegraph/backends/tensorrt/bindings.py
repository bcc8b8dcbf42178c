"""What an engine of TensorRT is bound to, as plain data that needs no TensorRT."""

from __future__ import annotations

from dataclasses import dataclass

from cachegraph.backends.named import COUNT, NamedGraph
from cachegraph.spec import BATCH, TensorSpec

LARGEST_BATCH = 8  # that engines are built for, unless the model was traced with a larger one


@dataclass(frozen=True)
class Binding:
    """One input or output of an engine.

    Attributes:
        name: of the input or output in the ONNX file.
        spec: shape and dtype as text; -1 stands for a size that varies.
        output: it is handed out.
        smallest: shape at the least sizes; an input's profile begins here.
        usual: shape that kernels are chosen for.
        largest: shape at the greatest sizes.
    """

    name: str
    spec: str
    output: bool
    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


def binding_plan(graph: NamedGraph) -> tuple[Binding, ...]:
    """The bindings of an engine: inputs, then outputs, in the graph's order.

    The batch varies from 1 to :data:`LARGEST_BATCH`, a count of tokens over what the steps of the
    graph need, and other sizes from half to twice those of the example.

    Args:
        graph: that the engine is built from.
    """
    usual = graph.example_sizes()
    smallest, largest = dict[str, int](), dict[str, int]()
    for name, values in graph.sizes.items():
        least, most = min(values), max(values)
        if name == BATCH:
            least, most = 1, max(LARGEST_BATCH, most)
        elif not name.startswith(COUNT):
            least, most = least // 2, 2 * most
        smallest[name], largest[name] = least, most
    return tuple(
        Binding(
            name,
            str(TensorSpec(tuple(d if isinstance(d, int) else -1 for d in spec.shape), spec.dtype)),
            output,
            spec.sizes(smallest),
            spec.sizes(usual),
            spec.sizes(largest),
        )
        for output, specs in ((False, graph.inputs), (True, graph.outputs))
        for name, spec in specs.items()
    )
