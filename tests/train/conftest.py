from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from cachegraph.train import train

_MADE: dict[Any, Any] = {}
_TRACE = train._trace


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A routed graph keeps nothing between calls, so tests share it; tracing costs the most."""

    def once(model: nn.Module, *how: Any) -> Any:
        key = (id(model), *how)
        if key not in _MADE:
            _MADE[key] = (model, _TRACE(model, *how))  # the model, so that its id stays its own
        return _MADE[key][1]

    monkeypatch.setattr(train, "_trace", once)
