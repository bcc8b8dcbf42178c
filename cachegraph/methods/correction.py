"""GOC: push reused values further along their last change.

Source: qiujx0520/GOC_ICCV2025, ``DiT/models/models.py:125-173``. Each block keeps what the last two
steps used, computed, reused or corrected alike; a corrected value is kept in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, block_of
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse, Row
from cachegraph.schedule.schedule import Schedule

from .policies import GOCCorrection

_Partners = dict[int, tuple[int, ...]]  # site -> the other attn and mlp sites of its block


def correct(
    schedule: Schedule, correction: GOCCorrection, rows: Sequence[Row], sites: Sequence[Site]
) -> tuple[Row, ...]:
    """Rows in which the correction's steps forecast instead of reusing.

    A site that is computed at such a step stays computed (the published list for the router host
    names step 19, where that router runs everything), and one that the two steps before used the
    same value of has no change to follow: it stays a reuse.

    Raises:
        PlanError: no step of the list reuses anything, so the correction would do nothing.
    """
    partners = _partners(sites) if correction.both_modules else {}
    if not any(_is_open(rows[s], i, partners) for s in correction.steps for i in range(len(sites))):
        both = " attn and mlp of one block" if correction.both_modules else ""
        raise PlanError(
            "the correction changes nothing: none of its steps reuses a value",
            place=schedule.where("correction", "steps"),
            expected=f"steps at which the policy reuses{both}",
            found=", ".join(map(str, correction.steps)),
            remedy="cachegraph plan shows what each step does",
        )
    used: list[list[int]] = [[] for _ in sites]  # per site and step, the step that made the value
    corrected: list[Row] = []
    for step, row in enumerate(rows):
        wanted = step in correction.steps
        actions = list(row)
        for i, action in enumerate(row):
            weight = correction.weight if wanted and _is_open(row, i, partners) else 0
            actions[i] = _action(action, used[i], weight)
            used[i].append(_made_at(actions[i], step))
        corrected.append(tuple(actions))
    return tuple(corrected)


def _is_open(row: Row, index: int, partners: _Partners) -> bool:
    """True where a site is reused and so are, with ``both_modules``, the others of its block."""
    return all(isinstance(row[i], Reuse) for i in (index, *partners.get(index, ())))


def _action(action: Action, used: Sequence[int], weight: float) -> Action:
    if not isinstance(action, Reuse) or not used:
        return action
    newest = used[-1]
    if weight and len(used) > 1 and used[-2] != newest:
        return Forecast((newest, used[-2]), (1 + weight, -weight), keeps=True)
    return Reuse(newest)


def _made_at(action: Action, step: int) -> int:
    match action:
        case Reuse(source):
            return source
        case Compute() | Forecast() | Refresh():
            return step


def _partners(sites: Sequence[Site]) -> _Partners:
    """Which sites are corrected together, or not at all."""
    blocks: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        if site.kind in (SiteKind.ATTN, SiteKind.MLP):
            blocks.setdefault(block_of(site), []).append(i)
    return {i: tuple(j for j in members if j != i) for members in blocks.values() for i in members}
