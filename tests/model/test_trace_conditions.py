"""Conditions on the batch: a graph that is the model for some batches only says for which."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import SessionError
from cachegraph.model.conditions import failed, parse
from cachegraph.model.trace import TracedModel, trace
from cachegraph.schedule.schedule import uncached


class Guarded(nn.Module):
    """A residual mlp whose result is doubled for some batches."""

    def __init__(self, doubles: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.doubles = doubles

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * t.view(-1, 1, 1)
        x = x + self.mlp(x)
        return 2 * x if self.doubles(x) else x


FORMS: dict[str, Callable[[Tensor], bool]] = {
    "> 3": lambda x: x.shape[0] > 3,
    "== 1": lambda x: x.shape[0] == 1,
    "> 1": lambda x: x.shape[0] > 1,
    "% 2 == 0": lambda x: x.shape[0] % 2 == 0,
    "in (2, 3)": lambda x: x.shape[0] in (2, 3),
    "one of two": lambda x: x.shape[0] * 3 < 9 or x.shape[0] // 2 == 2,
    "half": lambda x: x.shape[0] / 2 > 1.2,
    "chunks": lambda x: len(x.chunk(3)) == 2,  # torch asks, not the model
    "check": lambda x: torch._check(x.shape[0] < 5) is not None,
    # Of these, torch.export leaves no word.
    "one less": lambda x: bool(x.shape[0] - 1),
    "squeezed": lambda x: x.squeeze(0).ndim == 2,
    "turned": lambda x: x.transpose(0, 1).is_contiguous(),
    "bytes": lambda x: x.nbytes > 200,
    "counted": lambda x: len(x) > 3,
    "a number": lambda x: int(x.shape[0]) == 5,
}


def call(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, 4, generator=generator), torch.rand(batch, generator=generator)


def takes(found: TracedModel, batch: int) -> bool:
    """Whether a call of this batch is right by the traced shapes and conditions."""
    shapes = [spec.shape for _, spec in found.signature.inputs]
    sizes: dict[str, int] = {}
    for shape, tensor in zip(shapes, call(batch), strict=True):
        for dim, size in zip(shape, tensor.shape, strict=True):
            if (dim if isinstance(dim, int) else sizes.setdefault(dim, size)) != size:
                return False
    return failed(found.conditions, sizes) is None


@pytest.mark.parametrize("example", [1, 2, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_batch_is_right_or_refused(form: str, example: int) -> None:
    model = Guarded(FORMS[form]).eval()
    if form == "check" and example == 5:
        pytest.skip("the model itself refuses it")
    found = trace(model, call(example))
    assert takes(found, example)
    assert bool(found.conditions) != bool(found.fixed_batch_reason)
    for batch in range(1, 7):
        if takes(found, batch):
            with torch.no_grad():
                assert torch.equal(found.module(*call(batch))[0], model(*call(batch))), batch


@pytest.mark.parametrize(
    ("form", "example", "right"),
    [
        ("> 3", 2, {1, 2, 3}),
        ("> 3", 5, {4, 5, 6}),
        ("== 1", 2, {2, 3, 4, 5, 6}),
        ("== 1", 1, {1}),
        ("% 2 == 0", 2, {2, 4, 6}),
        ("% 2 == 0", 1, {1}),  # it is traced with a batch of two
        ("in (2, 3)", 2, {2}),
        ("check", 2, {1, 2, 3, 4}),
        ("one less", 2, {2, 3, 4, 5, 6}),
        ("one less", 1, {1}),
        ("squeezed", 2, {2, 3, 4, 5, 6}),
        ("squeezed", 1, {1}),
        ("turned", 5, {2, 3, 4, 5, 6}),
    ],
)
def test_which_batches_are_right(form: str, example: int, right: set[int]) -> None:
    found = trace(Guarded(FORMS[form]).eval(), call(example))
    assert {batch for batch in range(1, 7) if takes(found, batch)} == right


def test_conditions_are_text() -> None:
    found = trace(Guarded(FORMS["> 3"]).eval(), call(2))
    assert found.conditions == (f"{found.batch} <= 3",)
    assert failed(found.conditions, {str(found.batch): 4}) == f"{found.batch} <= 3"


def test_a_model_without_branches_has_no_conditions() -> None:
    assert trace(Guarded(lambda x: False).eval(), call(2)).conditions == ()


def test_the_reason_names_the_line_or_the_condition() -> None:
    reasons = [
        trace(Guarded(FORMS[form]).eval(), call(example)).fixed_batch_reason
        for form, example in (("in (2, 3)", 2), ("half", 2), ("> 1", 1))
    ]
    assert reasons[0].startswith("the model branches on sizes (test_trace_conditions.py:")
    assert reasons[1].startswith("the model branches on sizes: not a")
    assert reasons[2].startswith("the model takes batches of one another way (")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("s0 <= 3", {0, 1, 2, 3}),
        ("not (s0 % 2 == 0) or s0 == 2", {1, 2, 3, 5}),
        ("(s0 > 1) and (4*s0 != 12)", {2, 4, 5}),
        ("Max(4, s0) == 5", {5}),
        ("2 // s0 == 1", {2}),
    ],
)
def test_conditions_are_read(text: str, right: set[int]) -> None:
    found = set()
    for size in range(6):
        with suppress(ZeroDivisionError):
            found |= {size} if failed([text], {"s0": size}) is None else set()
    assert found == right


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "s0 + 1",
        "",
        "(",
        "True",
        "s0 < 1.5",
        "f(s0) == 1",
        "s0.bit_length() < 2",
        "[] == []",
        "1 < s0 < 3",
        "s0 is 3",
        "__import__('os') == 1",
        "s0 == 1; s0",
        "1 == 1" + " and 1 == 1" * 100,
    ],
)
def test_anything_else_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match="not a "):
        parse(text)


class Listed(Guarded):
    """Takes its batch apart in Python, so that a trace is of one batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat(
            [super(Listed, self).forward(x[i : i + 1], t[i : i + 1]) for i in range(len(x))]
        )


@pytest.mark.parametrize("by_item", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_that_fixes_its_batch_takes_its_own_example(batch: int, by_item: bool) -> None:
    """Also one of a single image, which is traced as two where the batch may vary."""
    model = Listed(lambda x: False).eval()
    found = trace(model, call(batch), by_item=by_item)
    assert found.fixed_batch_reason
    assert takes(found, 1 if found.items is not None else batch)
    artifact = cg.compile(model, uncached(3), call(batch), backend="eager")
    with torch.no_grad():
        assert torch.equal(cg.load(artifact)(*call(batch), step=0), model(*call(batch)))


@pytest.mark.parametrize(
    "form", ["> 3", "== 1", "% 2 == 0", "in (2, 3)", "half", "one less", "turned", "counted"]
)
@pytest.mark.parametrize("example", [1, 2, 5])
def test_a_compiled_loop_is_right_for_every_batch_or_refuses_it(form: str, example: int) -> None:
    model = Guarded(FORMS[form]).eval()
    artifact = cg.compile(model, uncached(3), call(example), backend="eager")
    for batch in range(1, 7):
        run = cg.load(artifact)
        try:
            found = run(*call(batch), step=0)
        except SessionError as error:
            assert batch != example
            message = str(error)
            assert "inputs of these sizes" in message or "does not fit" in message, message
            continue
        with torch.no_grad():
            assert torch.equal(found, model(*call(batch))), batch
