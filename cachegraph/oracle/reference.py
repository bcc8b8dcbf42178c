"""The plan executed by plain Python hooks on the eager module: slow, obvious, the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from cachegraph.errors import SiteError
from cachegraph.model.items import joined
from cachegraph.model.site import Site
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse, makes_value
from cachegraph.plan.plan import Plan
from cachegraph.plan.variant import VALUES
from cachegraph.runtime.tracking import Position, Tracking, make_tracking
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import Schedule, load_schedule

from .by_graph import GraphRun
from .tokens import TokenChoice

Values = dict[tuple[str, int], list[Tensor]]  # (site, step that made it) -> its values
Made = dict[str, list[Tensor]]  # site -> its values


class ReferenceRunner:
    """Runs a schedule as the published implementations do: by replacing what modules return.

    It shares the plan with the compiled graphs and nothing else, so that the two can be compared.
    A site whose module returns exactly the site's values is skipped as a whole; elsewhere the
    value is computed and then replaced.

    Args:
        model: any module that can be traced; it is changed only while a call runs.
        schedule: path, preset name, dict or Schedule.
    """

    def __init__(
        self, model: nn.Module, schedule: str | Path | Mapping[str, object] | Schedule
    ) -> None:
        self.model = model
        self.schedule = load_schedule(schedule)
        self._traced: TracedModel | None = None
        self._plan: Plan | None = None
        self._items: dict[int, ReferenceRunner] = {}
        self._templates: dict[str, Any] = {}  # site -> what its module returns, values left out
        self.reset()

    @classmethod
    def of_plan(
        cls, model: nn.Module, traced: TracedModel, plan: Plan, schedule: Schedule
    ) -> ReferenceRunner:
        """A runner of a plan that is already made, for a model that is already traced."""
        runner = cls(model, schedule)
        runner._traced, runner._plan = traced, plan
        return runner

    def reset(self) -> None:
        """Begin a new trajectory."""
        self._items.clear()
        self._values: Values = {}
        self._choice: TokenChoice | None = None
        self._position = Position()

    @property
    def picked(self) -> dict[str, Tensor]:
        """Tokens ``(B, k)`` that were last recomputed at each site, best first."""
        return self._choice.picked if self._choice is not None else {}

    @torch.no_grad()
    def __call__(self, *args: Any, step: int | None = None, **kwargs: Any) -> Any:
        """Call the model for one step; arguments as the model takes them.

        Raises:
            SessionError: the call does not fit the trajectory.
        """
        traced, plan = self._prepare(args, kwargs)
        if (items := traced.items) is not None:
            given = traced.signature.bind(args, kwargs)
            if (count := items.count(given)) > 1:
                parts = [items.part(given, number) for number in range(count)]
                return joined([self._item(i)(**part, step=step) for i, part in enumerate(parts)])
        inputs = traced.signature.flatten(args, kwargs)
        position = self._tracking(traced, plan).locate(self._position, inputs, step)
        if position.step == 0:
            self.reset()
            if plan.selection is not None:
                plan.selection.check_call(inputs[0].shape[0])
                self._choice = TokenChoice(plan, plan.selection)
        if self.by_hooks:
            result, made = self._hooked(plan, position.step, args, kwargs)
        else:
            run, made = self._interpreted(traced, plan, position.step, inputs)
            result = run.result(kwargs.get("return_dict"))
        self._values.update({(name, position.step): v for name, v in made.items()})
        for freed in plan.freed_after[position.step]:
            if freed.part == VALUES:
                self._values.pop((plan.sites[freed.site].name, freed.made), None)
        self._position = position
        return result

    def _item(self, number: int) -> ReferenceRunner:
        """The runner of one item of a batch, for a model that is traced for one."""
        if number not in self._items:
            traced, plan = self._prepare((), {})
            self._items[number] = self.of_plan(self.model, traced, plan, self.schedule)
        return self._items[number]

    @property
    def by_hooks(self) -> bool:
        """Whether modules return every value of every site, so that hooks can replace it.

        Else the traced graph is interpreted, with the values of sites replaced in it.
        """
        sites = self._plan.sites if self._plan is not None else ()
        return all(value.module is not None for site in sites for value in site.values)

    def _hooked(self, plan: Plan, step: int, args: Any, kwargs: Any) -> tuple[Any, Made]:
        """What the model returns for one step, and what its sites made."""
        row, made = plan.rows[step], Made()
        with ExitStack() as stack:
            if (choice := self._choice) is not None:
                stack.enter_context(choice.watch(self.model, row))
            for site, action in zip(plan.sites, row, strict=True):
                if choice is not None and isinstance(action, Refresh):
                    self._refresh(stack, site, action, step, choice, made)
                    continue
                kept = self._kept(site, action)
                stack.enter_context(self._at_site(site, kept, made))
                if kept is not None and makes_value(action):
                    made[site.name] = kept
                if choice is not None and isinstance(action, Compute):
                    note = partial(choice.computed, site, step)
                    module = self._value_module(site, -1)
                    stack.callback(module.register_forward_hook(note).remove)
            result = self.model(*args, **kwargs)
        return result, made

    def _interpreted(
        self, traced: TracedModel, plan: Plan, step: int, inputs: Sequence[Tensor]
    ) -> tuple[GraphRun, Made]:
        """The graph with kept values in it, run, and what its sites made."""
        actions = list(zip(plan.sites, plan.rows[step], strict=True))
        found = ((site.name, self._kept(site, action)) for site, action in actions)
        kept = {name: values for name, values in found if values is not None}
        run = GraphRun(traced, plan.sites, kept)
        run.run(*inputs)
        again = {s.name: kept[s.name] for s, a in actions if s.name in kept and makes_value(a)}
        return run, run.values() | again

    def _refresh(
        self,
        stack: ExitStack,
        site: Site,
        action: Refresh,
        step: int,
        choice: TokenChoice,
        made: dict[str, list[Tensor]],
    ) -> None:
        """Let the site run for all tokens, then keep only the chosen ones of what it made."""
        module, kept = self._value_module(site, 0), self._values[site.name, action.source][0]

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            made[site.name] = [choice.refreshed(site, action, step, kept, output)]
            return made[site.name][0]

        kept_inside = partial(choice.as_it_was, site, action)
        stack.callback(module.register_forward_pre_hook(kept_inside).remove)
        stack.callback(module.register_forward_hook(hook).remove)

    def _value_module(self, site: Site, index: int) -> nn.Module:
        path = site.values[index].module
        if path is None:
            raise SiteError(
                f"no module returns value {index} of site {site.name}",
                remedy="ReferenceRunner needs one; compiled graphs do not",
            )
        return self.model.get_submodule(path)

    def _prepare(self, args: Any, kwargs: Any) -> tuple[TracedModel, Plan]:
        if self._traced is None:
            self._traced = trace(self.model, args, kwargs)
        if self._plan is None:
            self._plan = plan_of(self.schedule, self._traced)
        return self._traced, self._plan

    def _tracking(self, traced: TracedModel, plan: Plan) -> Tracking:
        return make_tracking(
            traced.signature,
            plan.steps,
            timesteps=self.schedule.timesteps,
            ascending=self.schedule.order == "ascending",
        )

    def _kept(self, site: Site, action: Action) -> list[Tensor] | None:
        """What stands for the site's values in this step; None where they are computed."""
        match action:
            case Compute():
                return None
            case Reuse(source):
                return self._values[site.name, source]
            case Forecast(sources, coefficients):
                histories = zip(*(self._values[site.name, s] for s in sources), strict=True)
                return [
                    torch.stack([c * v for c, v in zip(coefficients, h, strict=True)]).sum(0)
                    for h in histories
                ]
            case Refresh():
                raise ValueError("a refresh is no replacement")

    def _of_blocks(
        self, site: Site, kept: Tensor | None, added: list[Tensor]
    ) -> AbstractContextManager[None]:
        if site.reader is None:
            raise SiteError(
                f"no module takes the stream in front of {site.name}",
                remedy="ReferenceRunner needs one; compiled graphs do not",
            )
        reader = self.model.get_submodule(site.reader)
        return _residual(reader, self._value_module(site, 0), site, kept, added)

    @contextmanager
    def _at_site(
        self, site: Site, kept: list[Tensor] | None, made: dict[str, list[Tensor]]
    ) -> Iterator[None]:
        """Record a site's values while the model runs, or replace them."""
        if site.relative:
            added: list[Tensor] = []
            with self._of_blocks(site, None if kept is None else kept[0], added):
                yield
            made.update({site.name: added} if kept is None else {})
            return
        template = self._templates.get(site.name)
        if kept is not None and template is not None and site.module is not None:
            module = self.model.get_submodule(site.module)
            places, spec = template
            filled = _pytree.tree_unflatten([kept[i] for i in places], spec)
            with _forward_replaced(module, lambda: filled):
                yield
            return
        seen: list[Tensor | None] = [None] * len(site.values)
        with ExitStack() as stack:
            for index in range(len(site.values)):
                module = self._value_module(site, index)
                hook = _hook(seen, index, None if kept is None else kept[index], site.call)
                stack.callback(module.register_forward_hook(hook).remove)
            if kept is None and site.module is not None and not site.call:
                container = self.model.get_submodule(site.module)
                learn = _learner(self._templates, site.name, seen)
                stack.callback(container.register_forward_hook(learn).remove)
            yield
        for value, output in zip(site.values, seen, strict=True):
            if output is None:
                raise SiteError(
                    f"module {value.module} did not return a value of site {site.name}",
                    expected=f"call {site.call + 1} of the module",
                )
        if kept is None:
            made[site.name] = [v for v in seen if v is not None]


@contextmanager
def _residual(
    reader: nn.Module, end: nn.Module, site: Site, kept: Tensor | None, seen: list[Tensor]
) -> Iterator[None]:
    """Record what blocks add to the stream, or add what was kept to it in their place."""
    spec = site.values[0].spec
    streams: list[Tensor] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        streams.extend(t for t in tensors if t.ndim == len(spec.shape) and not streams)

    def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if kept is not None:
            return streams[0] + kept
        seen.append(output - streams[0])
        return None

    with ExitStack() as stack:
        stack.callback(reader.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(end.register_forward_hook(after).remove)
        yield


def _hook(
    seen: list[Tensor | None], index: int, replacement: Tensor | None, call: int
) -> Callable[..., Tensor | None]:
    calls = 0

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls - 1 != call:
            return None
        seen[index] = output
        return replacement

    return hook


def _learner(
    templates: dict[str, Any], name: str, seen: list[Tensor | None]
) -> Callable[..., None]:
    """Find the site's values in what its module returns, by identity.

    A module that is called once more returns something else then, so it is not replaced as a whole.
    """

    def learn(_module: nn.Module, _args: Any, output: Any) -> None:
        templates.pop(name, None)
        leaves, spec = _pytree.tree_flatten(output)
        places = [next((i for i, v in enumerate(seen) if v is leaf), -1) for leaf in leaves]
        if sorted(places) == list(range(len(seen))):
            templates[name] = (places, spec)

    return learn


@contextmanager
def _forward_replaced(module: nn.Module, result: Callable[[], Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: result()
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
