"""What acceleration has done for a pipeline, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .denoiser import Denoiser
from .tally import COMPUTED, PARTLY, REUSED, UNCACHED

_KINDS = (COMPUTED, PARTLY, REUSED, UNCACHED)


@dataclass(frozen=True)
class ComponentSummary:
    """What ran of one transformer.

    Attributes:
        component: ``transformer`` or ``transformer_2``.
        policy: the schedule's method.
        backend: what runs the graphs.
        images: begun.
        calls: ``computed``, ``partly reused``, ``reused`` and ``uncached`` -> how many.
        flops_saved: share of the cached calls' FLOPs that was not spent, as predicted.
        seconds_saved: what reused calls would have taken more, had they been computed.
        cache_bytes: most that one branch of one form keeps between steps.
        freed_bytes: what it would keep more without freeing values after their last use.
        shared_bytes: weights that all forms and the model have in common, counted once a form.
        forms: of call, in words, in the order in which they were compiled.
    """

    component: str
    policy: str
    backend: str
    images: int
    calls: Mapping[str, int]
    flops_saved: float
    seconds_saved: float
    cache_bytes: int
    freed_bytes: int
    shared_bytes: int
    forms: tuple[str, ...]

    def __str__(self) -> str:
        """Some lines for people."""
        calls = ", ".join(f"{self.calls[kind]} {kind}" for kind in _KINDS if self.calls[kind])
        lines = [
            f"{self.component}: {self.policy}, {self.backend}; {self.images} images, "
            f"calls: {calls or 'none'}",
            f"  saved: {self.flops_saved:.0%} of FLOPs, {self.seconds_saved:.2f} s",
            f"  memory: {_size(self.cache_bytes)} kept between steps ({_size(self.freed_bytes)} "
            f"less by freeing early), {_size(self.shared_bytes)} of weights shared, not copied",
            f"  compiled for {len(self.forms)} forms of call:",
            *(f"    {form}" for form in self.forms),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Summary:
    """What ran of all transformers of a pipeline.

    Attributes:
        components: one a transformer.
    """

    components: tuple[ComponentSummary, ...]

    def __str__(self) -> str:
        """Some lines for people."""
        return "\n".join(map(str, self.components))


def summarise(denoiser: Denoiser) -> ComponentSummary:
    """What a denoiser has done."""
    tally, forms = denoiser.tally, denoiser.forms
    costs = [form.runner.program.cost for form in forms.compiled]
    kept = [max(cost.cache_bytes, default=0) for cost in costs]
    unfreed = [
        max(form.runner.program.plan.unfreed_bytes(form.runner.program.symbols), default=0)
        for form in forms.compiled
    ]
    return ComponentSummary(
        component=denoiser.component,
        policy=forms.schedule.policy.method,
        backend=forms.backend,
        images=tally.images,
        calls={kind: tally.calls[kind] for kind in _KINDS},
        flops_saved=1 - tally.flops / tally.uncached_flops if tally.uncached_flops else 0.0,
        seconds_saved=tally.seconds_saved,
        cache_bytes=max(kept, default=0),
        freed_bytes=max((b - a for a, b in zip(kept, unfreed, strict=True)), default=0),
        shared_bytes=sum(cost.weight_bytes for cost in costs),
        forms=tuple(map(str, forms.compiled)),
    )


def _size(count: int) -> str:
    """Bytes for people: ``1.5 MB``."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
