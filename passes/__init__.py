"""The rewrites that turn a traced model into the graph of one kind of step."""

# This folder lies beside the package that it belongs to, so from the root of a checkout plain
# `import passes` would find it and load every pass a second time, under another name.
if __name__ != "cachegraph.passes":
    raise ImportError(
        f"the folder passes belongs to cachegraph and was imported as {__name__!r}; "
        "import cachegraph.passes instead"
    )

from cachegraph.graph import Pass
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.gather_tokens import GatherTokens
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.passes.lower import Lower

PIPELINE: tuple[Pass, ...] = (
    InsertCache(),  # first: everything below looks at what its reads made superfluous
    GatherTokens(),  # while the whole region is still there to be copied
    DropDead(),  # before lowering: a read whose value nobody uses takes its slot with it
    Lower(),  # last: no later pass knows cache operations
)
