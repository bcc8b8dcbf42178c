"""The caching methods, one file each; ``METHODS`` is all there is to change for another one."""

from .duca import Duca
from .fora import Fora
from .forecast import ForecastMethod
from .full import Full
from .hermite import Hermite
from .method import Method
from .router import Router
from .smoothcache import SmoothCache
from .table import Table
from .taylorseer import TaylorSeer
from .toca import Toca

METHODS: tuple[type[Method], ...] = (
    Full,
    Fora,
    Table,
    Router,
    SmoothCache,
    TaylorSeer,
    Hermite,
    ForecastMethod,
    Toca,
    Duca,
)
UNCACHED = Full(method="full")
