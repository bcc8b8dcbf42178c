"""The plan executed on the traced graph, node by node: where no module returns a site's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from cachegraph.model.site import Site
from cachegraph.model.trace import TracedModel


class GraphRun(fx.Interpreter):
    """One call of a traced graph in which what sites made can be replaced and is noted.

    It knows nothing of slots, variants and passes, so it can tell whether they are right.

    Args:
        traced: the model.
        sites: whose values are noted.
        kept: site -> what stands for its values in this call.
    """

    def __init__(
        self, traced: TracedModel, sites: Sequence[Site], kept: Mapping[str, Sequence[Tensor]]
    ) -> None:
        super().__init__(traced.module)
        self._places = {v.node: (site.name, i) for site in sites for i, v in enumerate(site.values)}
        self._signature, self._kept = traced.signature, kept
        self._made: dict[str, dict[int, Tensor]] = {}
        self._outputs: Sequence[Tensor] = ()

    def run(self, *inputs: Any, **_: Any) -> Any:
        """The graph's outputs for the model's tensors, in the order of the graph."""
        self._outputs = super().run(*inputs)
        return self._outputs

    def result(self, return_dict: bool | None) -> Any:
        """What the model would have returned."""
        return self._signature.unflatten(self._outputs, return_dict)

    def values(self) -> dict[str, list[Tensor]]:
        """What each site made, where it ran."""
        return {name: [made[i] for i in sorted(made)] for name, made in self._made.items()}

    def run_node(self, n: fx.Node) -> Any:
        """A node's value, or what replaces it."""
        site, index = self._places.get(n.name, ("", 0))
        if site in self._kept:
            return self._kept[site][index]
        value = super().run_node(n)
        if site:
            self._made.setdefault(site, {})[index] = value
        return value
