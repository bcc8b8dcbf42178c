"""Tracing: what is refused, what the graph is free of, the batch; the model stays as it was."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cachegraph.errors import InputError, ModelError, SiteError, TraceError
from cachegraph.graph.text import node_lines
from cachegraph.model.export import _inline_autocast
from cachegraph.model.trace import TracedModel, trace

aten = torch.ops.aten
X, T = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.25])


class Base(nn.Module):
    """A residual mlp, so that there is a site."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def body(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * t.view(-1, 1, 1)
        return x + self.mlp(x)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t)


def text(traced: TracedModel) -> str:
    return "\n".join(node_lines(traced.module.graph))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> TracedModel:
    return trace(model.eval(), args, kwargs)


def refused(kind: type[InputError], model: nn.Module, *args: Any) -> str:
    with pytest.raises(kind) as caught:
        traced(model, *args)
    assert caught.type is kind
    return str(caught.value)


# --- what is refused


def test_training_mode() -> None:
    with pytest.raises(ModelError, match=r"Base is in training mode; .*; call model.eval\(\)"):
        trace(Base().train(), (X, T))


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count.add_(1)
        return self.body(x, t) + self.count


class TakesAny(Base):
    def forward(self, *images: Tensor) -> Tensor:
        return self.body(*images)


class Branches(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t) if x.sum() > 0 else x


def test_model_that_changes_a_buffer() -> None:
    assert refused(TraceError, Counts(), X, T) == (
        "the model changes buffers when it is called; expected a forward without state; found count"
    )


def test_model_that_takes_any_arguments() -> None:
    assert "TakesAny.forward takes *images; wrap the model" in refused(TraceError, TakesAny(), X, T)


def test_model_whose_path_depends_on_data() -> None:
    message = refused(TraceError, Branches(), X, T)
    assert re.match(r"test_trace.py:\d+ in forward: the model reads numbers from an input", message)
    assert "found input 'x'" in message


MISFITS = [((X,), "missing a required argument: 't'"), ((X, T, T), "too many positional arguments")]


@pytest.mark.parametrize(("args", "found"), MISFITS)
def test_example_inputs_that_do_not_fit(args: tuple[Tensor, ...], found: str) -> None:
    message = refused(TraceError, Base(), *args)
    assert message.startswith("the example inputs do not fit Base.forward; expected (x: ")
    assert found in message


class Plain(Base):
    def forward(self, x: Any, t: Any = None) -> Tensor:
        return self.body(torch.ones(2, 3, 4), T)


@pytest.mark.parametrize("args", [(3,), (None,), (torch.tensor(1.0),)], ids=repr)
def test_no_input_with_a_batch(args: tuple[Any, ...]) -> None:
    assert "hold no tensor with a batch dimension; expected the latent first" in refused(
        ModelError, Plain(), *args
    )


def test_no_site() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    message = refused(SiteError, Flat(), X)
    assert message.startswith("no attention or mlp site was found in Flat; expected residual adds")


# --- the batch


def runs_like_the_model(found: TracedModel, model: nn.Module, batch: int) -> None:
    x, t = torch.randn(batch, 3, 4), torch.rand(batch)
    assert torch.equal(found.module(x, t)[0], model(x, t))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_is_a_symbol_whatever_the_example(batch: int) -> None:
    model = Base().eval()
    found = trace(model, (torch.randn(batch, 3, 4), torch.rand(batch)))
    assert found.batch is not None
    assert found.symbols == {found.batch: batch}
    assert found.fixed_batch_reason == ""
    b = found.batch
    assert [spec.shape for _, spec in found.signature.inputs] == [(b, 3, 4), (b,)]
    assert found.signature.outputs[0].shape == (found.batch, 3, 4)
    for other in (1, 2, 7):
        runs_like_the_model(found, model, other)


def test_batch_is_fixed_where_asked_for() -> None:
    found = trace(Base().eval(), (X, T), dynamic_batch=False)
    assert (found.batch, found.symbols, found.fixed_batch_reason) == (None, {}, "asked for")
    assert [spec.shape for _, spec in found.signature.inputs] == [(2, 3, 4), (2,)]


class Pairs(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x.reshape(2, 3, 4), t)


class Counted(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not isinstance(x.shape[0], int):
            raise TypeError("the batch must be a number")
        return self.body(x, t)


FIXED = [
    (Pairs(), "the model fixes it", 2),
    (Counted(), "item by item: torch.export: TypeError: the batch must be a", 1),
]


@pytest.mark.parametrize(("model", "reason", "batch"), FIXED)
def test_batch_is_fixed_where_the_model_fixes_it(model: nn.Module, reason: str, batch: int) -> None:
    found = traced(model, X, T)
    assert found.batch is None
    assert found.fixed_batch_reason.startswith(reason)
    assert (found.items is not None) == (batch == 1)
    runs_like_the_model(found, model, batch)


# --- what the graph is free of


class Tidied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.dropout(x).to(torch.float32)
        torch._check(x.shape[1] > 2)
        return self.body(F.dropout(x, 0.1, training=False), t).clone()


def test_inactive_dropout_checks_and_clones_are_removed() -> None:
    model = Tidied()
    found = traced(model, X, T)
    assert not re.search("dropout|assert|constrain|clone", text(found))
    runs_like_the_model(found, model, 2)


class Islands(Base):
    """Regions with autocast switched off, as normalisations and rotary embeddings have them."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device_type="cpu", enabled=False):
            half, scaled = x.float() * 0.5, x.sin()
        x = half + scaled
        with torch.autocast(device_type="cpu", enabled=False):
            x = self.body(x, t)
        return x.cos()


def test_regions_without_autocast_are_inlined() -> None:
    model = Islands()
    found = traced(model, X, T)
    assert "autocast" not in text(found)
    assert [site.name for site in found.sites] == ["mlp"]
    assert not [n for n in found.module.graph.nodes if isinstance(n.target, fx.GraphModule)]
    runs_like_the_model(found, model, 2)


def test_regions_that_torch_leaves_are_inlined_too() -> None:
    """Older versions of torch decompose a graph without looking into these regions."""
    model = Islands().eval()
    with torch.no_grad():
        module = torch.export.export(model, (X, T), strict=False).module(check_guards=False)
        assert "wrap_with_autocast" in str(module.graph)
        _inline_autocast(module)
        module.recompile()
        assert "wrap_with_autocast" not in str(module.graph)
        assert torch.equal(module(X, T), model(X, T))


class CastsItself(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            return self.body(x, t)


def test_regions_with_autocast_become_casts() -> None:
    model = CastsItself()
    found = traced(model, X, T)
    assert "autocast" not in text(found)
    assert "dtype=bf16" in text(found)
    runs_like_the_model(found, model, 2)


def test_graph_is_flat_and_has_the_values() -> None:
    found = traced(Base(), X, T)
    nodes = list(found.module.graph.nodes)
    assert {n.op for n in nodes} == {"placeholder", "get_attr", "call_function", "output"}
    assert found.stack is not None and found.stack.covers == ("mlp",)  # noqa: PT018
    assert {value.node for value in found.sites[0].values} < {n.name for n in nodes}
    assert all("val" in n.meta for n in nodes if n.op != "output")


# --- the model is as it was


class Remembers(Base):
    """Keeps what it computed in a former call: an export leaves fake tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}
        self.positions: Tensor | None = None
        self.register_buffer("grid", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.arange(4.0)
            self.cache[4] = self.positions
        self.later = x
        return self.body(x + self.positions * self.grid, t)


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = [(n, id(p), p.data_ptr(), p._version, p.requires_grad) for n, p in tensors]
    return [*held, *(dict(vars(m)) for m in model.modules())]


@pytest.mark.parametrize(
    "model", [Remembers(), Counts(), Branches()], ids=lambda m: type(m).__name__
)
def test_model_is_not_changed(model: nn.Module) -> None:
    model.eval().register_forward_hook(lambda *_: None)
    model.mlp[0].weight.requires_grad_(False)
    before = state(model)
    with nullcontext() if isinstance(model, Remembers) else pytest.raises(TraceError):
        trace(model, (X, T))
    assert state(model) == before
    assert not getattr(model, "cache", None)
    assert torch.is_grad_enabled()


def test_weights_are_shared_with_the_model() -> None:
    model = Base()
    found = traced(model, X, T)
    assert found.module.get_submodule("mlp.0").weight.data_ptr() == model.mlp[0].weight.data_ptr()


# --- forms of calls and results


@dataclass
class Result:
    sample: Tensor
    extra: Tensor | None = None


torch.export.register_dataclass(Result)


class Rich(Base):
    """Optional, nested and by-name arguments; a result by ``return_dict``."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        bias: Tensor | None = None,
        parts: dict[str, Tensor] | None = None,
        pair: list[Tensor] | None = None,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> Result | tuple[Tensor, ...]:
        x = self.body(x, t) * scale
        x = x if bias is None else x + bias
        x = x if parts is None else x + parts["b"] - parts["a"]
        x = x if pair is None else x * pair[0] + pair[1]
        return Result(sample=x) if return_dict else (x,)


def agree(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The model's result and the graph's through the signature."""
    found = traced(model, *args, **kwargs)
    with torch.no_grad():
        flat = found.module(*found.signature.flatten(args, kwargs))
        return model(*args, **kwargs), found.signature.unflatten(flat, kwargs.get("return_dict"))


def test_none_dicts_and_lists_go_in() -> None:
    parts = {"b": torch.randn(2, 3, 4), "a": torch.randn(2, 3, 4)}
    pair = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    wanted, found = agree(Rich(), X, T, bias=None, parts=parts, pair=pair, scale=2.0)
    assert torch.equal(found.sample, wanted.sample)
    wanted, found = agree(Rich(), X, T, torch.ones(4), return_dict=False)
    assert type(found) is tuple
    assert torch.equal(found[0], wanted[0])


def test_an_object_comes_out_as_an_object_or_a_tuple() -> None:
    found = traced(Rich(), X, T)
    flat = found.module(X, T)
    result = found.signature.unflatten(flat)
    assert result.sample is result["sample"] is result[0] is flat[0]
    assert list(result) == ["sample"]
    assert found.signature.unflatten(flat, return_dict=False) == (flat[0],)


class Lists(Base):
    def forward(self, x: Tensor, t: Tensor) -> list[Any]:
        y = self.body(x, t)
        return [y, {"twice": y * 2, "none": None}, (y + 1,)]


def test_lists_dicts_and_none_come_out() -> None:
    wanted, found = agree(Lists(), X, T)
    assert type(found) is list
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1]["twice"], wanted[1]["twice"])
    assert found[1]["none"] is None
    assert torch.equal(found[2][0], wanted[2][0])


class TakesNames(Base):
    def forward(self, x: Tensor, **named: Tensor) -> Tensor:
        return self.body(x, named["t"])


def test_arguments_by_any_name() -> None:
    assert torch.equal(*agree(TakesNames(), X, t=T))


class Configured(Base):
    config: ClassVar = {"channels": 4, "shape": (2, 3), "fn": len, "nested": {"a": None}}


def test_plain_configuration_is_kept() -> None:
    assert traced(Configured(), X, T).config == {
        "channels": 4,
        "shape": [2, 3],
        "nested": {"a": None},
    }
    assert traced(Base(), X, T).config == {}
