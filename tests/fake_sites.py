"""Sites as a trace of DiT or PixArt gives them, made by hand, and schedules for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cachegraph.methods.tokens import TokenMethod
from cachegraph.model.site import Inner, Site, SiteKind, SiteValue
from cachegraph.schedule.schedule import Schedule, load_schedule
from cachegraph.spec import TensorSpec

DIT = ("attn", "mlp")
PIXART = ("attn", "cross_attn", "mlp")
FULL_50_3 = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]  # counted down


def make_site(name: str, kind: str, tokens: int | str = 256, channels: int = 1152) -> Site:
    value = SiteValue(name, TensorSpec(("s0", tokens, channels), torch.float32), name)
    return Site(name, SiteKind(kind), (value,), name, source="x", cores=(), anchors=())


def make_sites(
    kinds: tuple[str, ...] = DIT, depth: int = 28, stack: bool = False, **sizes: Any
) -> list[Site]:
    sites = [make_site(f"blocks.{i}.{kind}", kind, **sizes) for i in range(depth) for kind in kinds]
    return [*sites, make_site("blocks", "stack", **sizes)] if stack else sites


def flux_sites(
    depth: int = 19, single: int = 38, split: bool = True, width: int = 3072
) -> list[Site]:
    """Those of FLUX: blocks of two streams, then blocks whose attention and mlp are one site."""
    sites = []
    for block in (f"double_blocks.{i}" for i in range(depth)):
        image, text = (
            _tokens(f"{block}.{name}", n, width) for name, n in (("img", 4096), ("txt", 512))
        )
        sites += [
            Site(f"{block}:attn", SiteKind.ATTN, (image, text), None, anchors=()),
            replace(make_site(f"{block}.img_mlp", "mlp", 4096, width), source=image.residual),
            replace(make_site(f"{block}.txt_mlp", "mlp", 512, width), source=text.residual),
        ]
    for block in (f"single_blocks.{i}" for i in range(single)):
        site = replace(make_site(f"{block}:attn", "attn", 4608, width), fused=True)
        spec = TensorSpec(("s0", 4608, width), torch.float32)
        inner = Inner("cat", spec, (0, width)) if split else None
        sites.append(replace(site, inner=inner))
    return sites


def _tokens(name: str, tokens: int, width: int) -> SiteValue:
    spec = TensorSpec(("s0", tokens, width), torch.float32)
    return SiteValue(name, spec, name, residual=f"{name}.add")


def make(steps: int, site_filter: dict[str, Any] | None = None, **policy: Any) -> Schedule:
    keys = {"cachegraph": 1, "steps": steps, "policy": policy}
    return load_schedule({**keys, "sites": site_filter} if site_filter else keys)


def policy_of(steps: int, **policy: Any) -> TokenMethod:
    made = make(steps, **policy).policy
    assert isinstance(made, TokenMethod)
    return made


def kinds_of(steps: int, **policy: Any) -> dict[str, list[int]]:
    """Types of the steps, such as ``FP`` for full and then partial -> steps as the rules count."""
    made = policy_of(steps, **policy)
    found: dict[str, list[int]] = {}
    for step, pair in enumerate(made.step_types(steps)):
        at = steps - 1 - step if made.rules == "dit" else step
        found.setdefault("".join(kind.name[0] for kind in pair), []).append(at)
    return found
