"""Checkpoints of routers, in the published format.

``{"routers": {"0.prob": [2L], ...}, "opt": state of AdamW, "args": options}``, as the training
codes of Learning-to-Cache and HarmoniCa write and read them. What only a resumed run needs stands
beside them under ``cachegraph``.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachegraph.errors import InputError
from cachegraph.folders import replaced
from cachegraph.methods.router_file import read_scores
from cachegraph.zoo.checkpoint import read_pickle

from .scores import Scores

_OWN = "cachegraph"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        routers: ``[T, 2L]``.
        opt: state of the optimiser; empty where the file has none.
        own: what a run of ours needs to go on; empty in others' checkpoints.
    """

    routers: Tensor
    opt: Mapping[str, Any]
    own: Mapping[str, Any]


def write_checkpoint(
    path: Path, scores: Scores, options: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: of the file.
        scores: routers and optimiser.
        options: by the published names.
        own: plain data and tensors, see :class:`Checkpoint`.
    """
    table = enumerate(scores.table().cpu())
    content = {
        "routers": OrderedDict((f"{i}.prob", row.clone()) for i, row in table),
        "opt": scores.optimiser.state_dict(),
        "args": argparse.Namespace(**options),
        _OWN: dict(own),
    }
    with replaced(path) as partial:
        torch.save(content, partial)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, ours or a published one.

    Raises:
        InputError: it is none.
    """
    routers = torch.stack(read_scores(path)).float()
    content = read_pickle(path)
    found = content if isinstance(content, Mapping) else {}
    return Checkpoint(routers, found.get("opt") or {}, found.get(_OWN) or {})


def restore_optimiser(scores: Scores, opt: Mapping[str, Any], lr: float, place: str) -> None:
    """Moments and step counts as a checkpoint has them; the learning rate stays ours.

    Raises:
        InputError: they are of another number of routers or scores.
    """
    if not opt:
        return
    try:
        scores.optimiser.load_state_dict(dict(opt))
    except (ValueError, KeyError) as error:
        raise InputError(
            "the optimiser's state does not fit the routers", place=place, found=str(error)
        ) from error
    for group in scores.optimiser.param_groups:
        group["lr"] = lr
    for router, state in scores.optimiser.state.items():
        if state["exp_avg"].shape != router.shape:
            raise InputError("the optimiser's state is of another model", place=place)
