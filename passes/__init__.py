"""The rewrites that turn a traced model into the graph of one kind of step."""

# This folder lies beside the package that it belongs to, so from the root of a checkout plain
# `import passes` would find it and load every pass a second time, under another name.
if __name__ != "cachegraph.passes":
    raise ImportError(
        f"the folder passes belongs to cachegraph and was imported as {__name__!r}; "
        "import cachegraph.passes instead"
    )

from collections.abc import Sequence

from cachegraph.errors import InputError, nearest
from cachegraph.graph.step_graph import Pass
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.gather_tokens import GatherTokens
from cachegraph.passes.hoist_known import HoistKnown
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.passes.lower import Lower
from cachegraph.passes.slice_columns import SliceColumns

PIPELINE: tuple[Pass, ...] = (
    InsertCache(),  # first: everything below looks at what its reads made superfluous
    GatherTokens(),  # while the whole region is still there to be copied
    DropDead(),  # before lowering: a read whose value nobody uses takes its slot with it
    Lower(),  # no later pass knows cache operations
    SliceColumns(),  # while linear layers and those who use their chunks stand in one graph
    HoistKnown(),  # last: what it moves out no other pass would see
)
OPTIONAL = (SliceColumns.name, HoistKnown.name)  # exact optimisations


def passes_without(disabled: Sequence[str]) -> tuple[Pass, ...]:
    """The pipeline without some of its exact optimisations.

    Raises:
        InputError: no such pass, or one that nothing works without.
    """
    for name in disabled:
        if name not in OPTIONAL:
            raise InputError(
                f"pass {name!r} cannot be disabled",
                expected=", ".join(OPTIONAL),
                remedy=nearest(name, OPTIONAL),
            )
    return tuple(one for one in PIPELINE if one.name not in disabled)
