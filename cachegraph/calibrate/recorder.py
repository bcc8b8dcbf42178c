"""A model that measures how much the values of its sites change from call to call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachegraph.errors import InputError
from cachegraph.graph.step_graph import copy_module
from cachegraph.model.site import Site
from cachegraph.model.trace import TracedModel, trace
from cachegraph.oracle.trial import Progress

_Values = dict[tuple[int, ...], Tensor]  # sites whose values are alike -> their values in one


class NamedBranches:
    """What pipelines of diffusers put around the calls of a branch."""

    _name = ""

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Name the branch that the calls inside belong to, such as ``cond`` or ``uncond``."""
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before


class SiteRecorder(NamedBranches):
    """Is called as the model, once a step, and measures every site on the way.

    What runs is the traced graph with every site's values as further outputs. Of a trajectory it
    keeps the values of the last ``max_distance`` steps, and of their mean the last change.

    Args:
        model: in eval mode; it is not changed.
        steps: model calls per trajectory and branch.
        max_distance: the largest distance between steps to compare.
        average: take directions from the mean over all trajectories, which is kept for every step.
        progress: told after every call.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        max_distance: int,
        *,
        average: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._steps, self._distance = model, steps, max_distance
        self._say = progress or (lambda *_: None)
        self._sums: list[_Values] | None = [{} for _ in range(steps)] if average else None
        self._traced: TracedModel | None = None
        self._graph: fx.GraphModule | None = None
        self._shapes: list[torch.Size] = []
        self._errors = self._cosines = torch.empty(0)
        self._branches: dict[str, _Branch] = {}
        self._text = ""
        self._measured = 0  # trajectories, those of branches counted apart

    @contextmanager
    def trajectory(self, text: str) -> Iterator[None]:
        """Everything that is called inside is one trajectory.

        Args:
            text: what progress is told.

        Raises:
            InputError: there were not as many calls as steps.
        """
        self._branches.clear()
        self._text = text
        yield
        if not self._branches:
            raise InputError("the sampler does not call the model", expected=f"{self._steps} calls")
        for name, branch in self._branches.items():
            if branch.step != self._steps:
                raise self._wrong_count(str(branch.step), name)
        self._measured += len(self._branches)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model for the next step; arguments and result are the model's."""
        if self._traced is None or self._graph is None:
            self._traced = trace(self._model, args, kwargs, dynamic_batch=False)
            self._graph = graph_with_values(self._traced)
            self._begin(len(self._traced.sites))
        signature = self._traced.signature
        inputs = signature.flatten(args, kwargs)
        self._check_shapes([tensor.shape for tensor in inputs])
        branch = self._branches.setdefault(self._name, _Branch(self._distance))
        if branch.step == self._steps:
            raise self._wrong_count("more", self._name)
        outputs = self._graph(*inputs)
        self._measure(branch, self._stacked(outputs[len(signature.outputs) :]))
        branch.step += 1
        self._say(self._text, branch.step, self._steps)
        return signature.unflatten(outputs[: len(signature.outputs)], kwargs.get("return_dict"))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the model; none before the first call."""
        return self._traced.sites if self._traced is not None else ()

    def errors(self) -> Tensor:
        """``(sites, max_distance, steps)``, see :class:`.result.Calibration`."""
        return self._errors / self._measured

    def cosines(self) -> Tensor:
        """``(sites, steps)``, see the same."""
        if self._sums is None:
            return self._cosines / self._measured
        found = torch.full_like(self._cosines, torch.nan)
        for step in range(2, self._steps):
            first, second, third = self._sums[step - 2 : step + 1]
            for group, now in third.items():
                before, last = second[group] - first[group], now - second[group]
                found[list(group), step] = torch.cosine_similarity(last, before, dim=1).double()
        return found

    def _begin(self, sites: int) -> None:
        after = torch.arange(self._steps)
        self._errors = torch.zeros(sites, self._distance, self._steps, dtype=torch.float64)
        for distance in range(1, self._distance + 1):
            self._errors[:, distance - 1, after + distance >= self._steps] = torch.nan
        self._cosines = torch.zeros(sites, self._steps, dtype=torch.float64)
        self._cosines[:, :2] = torch.nan

    def _stacked(self, values: Sequence[Tensor]) -> _Values:
        """All values of a step, ``(sites, B, numbers)`` in groups of sites.

        Whole stacks are compared at once: an operation a site costs more than its numbers do.
        """
        rest = iter(values)
        flat = [
            torch.cat([next(rest).flatten(1) for _ in site.values], dim=1) for site in self.sites
        ]
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for i, value in enumerate(flat):
            alike.setdefault((value.shape, value.dtype), []).append(i)
        return {tuple(group): torch.stack([flat[i] for i in group]) for group in alike.values()}

    def _measure(self, branch: _Branch, values: _Values) -> None:
        """Compare the values of a step, ``(sites, B, numbers)`` in groups, with those before it."""
        for group, now in values.items():
            sites = list(group)
            sizes = now.float().abs().sum((1, 2)).double().cpu()
            for back, before in enumerate(branch.values):
                change = (before[group].float() - now.float()).abs_().sum((1, 2)).double().cpu()
                # Where everything is 0, a change is counted as one of its own size.
                relative = torch.where(sizes > 0, change / sizes, (change > 0).double())
                self._errors[sites, back, branch.step - back - 1] += relative
            mean = now.mean(1, dtype=torch.float64)
            if self._sums is not None:
                sums = self._sums[branch.step]
                sums[group] = sums.get(group, 0) + mean.float().cpu()
                continue
            if branch.step > 0:
                change = mean - branch.mean[group]
                if branch.step > 1:
                    cosine = torch.cosine_similarity(change, branch.change[group], dim=1)
                    self._cosines[sites, branch.step] += cosine.cpu()
                branch.change[group] = change
            branch.mean[group] = mean
        branch.values.appendleft(values)

    def _check_shapes(self, shapes: list[torch.Size]) -> None:
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise InputError(
                "the sampler changes the shape of an input",
                expected=" ".join(str(tuple(shape)) for shape in self._shapes),
                found=" ".join(str(tuple(shape)) for shape in shapes),
                remedy="sample the same batch in every trajectory",
            )

    def _wrong_count(self, found: str, branch: str) -> InputError:
        where = f" for {branch}" if branch else ""
        return InputError(
            f"the sampler does not call the model once a step{where}",
            expected=f"{self._steps} calls, one a step",
            found=found,
            remedy="set the number of steps to that of the sampler; where guidance makes calls of "
            'its own, put each into model.cache_context("cond") or ("uncond")',
        )


class _Branch:
    """What is kept of the trajectory of one branch (cond or uncond), newest first."""

    def __init__(self, max_distance: int) -> None:
        self.step = 0
        self.values: deque[_Values] = deque(maxlen=max_distance)
        self.mean: _Values = {}
        self.change: _Values = {}


def graph_with_values(traced: TracedModel) -> fx.GraphModule:
    """The model's graph with every value of every site behind its outputs, in site order."""
    module = copy_module(traced.module)
    nodes = {node.name: node for node in module.graph.nodes}
    [output] = module.graph.find_nodes(op="output")
    values = [nodes[value.node] for site in traced.sites for value in site.values]
    output.args = ((*output.args[0], *values),)
    module.recompile()
    return module
