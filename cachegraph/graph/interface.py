"""The interface of a graph: all that goes in and out of it, in order, by name.

It is made once, when a graph is lowered, and kept in the artifact: runner, backends, exports and
pictures ask it what an input or output is, and link steps by these names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from cachegraph.spec import TensorSpec


class Role(StrEnum):
    """What an input or output is."""

    MODEL = "model"  # the model's own
    SLOT = "slot"  # a tensor that an earlier step handed out
    CONSTANT = "constant"  # a step constant
    REQUEST = "request"  # known beforehand, the same at every step
    STEP = "step"  # known beforehand, another one at every step
    WRITE = "write"  # a tensor handed out to be kept


KNOWN = (Role.REQUEST, Role.STEP)


@dataclass(frozen=True)
class Port:
    """One input or output of a graph.

    Attributes:
        name: of the input; of an output, its name in files that others run.
        spec: shape and dtype.
        role: what it is.
        of: the slot that is read or written (``blocks.3.attn#0``), or the value that is known.
        age: position among the values of a slot that the step uses, 0 = newest.
    """

    name: str
    spec: TensorSpec
    role: Role
    of: str = ""
    age: int = 0


@dataclass(frozen=True)
class Interface:
    """What a graph takes and returns.

    Attributes:
        inputs: the model's, slots that are read, step constants, known values.
        outputs: the model's, then writes; of a prologue, known values.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @cached_property
    def slots(self) -> tuple[Port, ...]:
        """The slots that are read."""
        return _with(self.inputs, (Role.SLOT,))

    @cached_property
    def constants(self) -> tuple[Port, ...]:
        """The step constants."""
        return _with(self.inputs, (Role.CONSTANT,))

    @cached_property
    def known(self) -> tuple[Port, ...]:
        """The values that are known before the step runs."""
        return _with(self.inputs, KNOWN)

    @cached_property
    def writes(self) -> tuple[Port, ...]:
        """What is handed out to be kept."""
        return _with(self.outputs, (Role.WRITE,))


def _with(ports: Sequence[Port], roles: Sequence[Role]) -> tuple[Port, ...]:
    return tuple(port for port in ports if port.role in roles)
