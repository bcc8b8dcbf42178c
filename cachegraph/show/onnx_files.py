"""What there is to see of ONNX files, whether of an artifact or exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from cachegraph.backends.onnx.backend import require
from cachegraph.errors import InputError

from .picture import plain_table, size


def onnx_files(what: str) -> list[Path]:
    """The ONNX files that are meant: one, or those of a folder; none where it is something else."""
    path = Path(what)
    return [path] if path.suffix == ".onnx" else sorted(path.glob("*.onnx"))


def onnx_report(files: Sequence[Path]) -> list[RenderableType]:
    """A line a file and, of one file alone, all inputs, outputs and operators.

    Raises:
        BackendError: onnx is not installed.
        InputError: a file is missing or no ONNX file.
    """
    require(["onnx"], "onnx", "cachegraph[onnx]")
    numbers = ("inputs", "outputs", "nodes", "size", "weights elsewhere")
    table = plain_table("file", *numbers, right=numbers)
    graphs = [_read(path) for path in files]
    for path, graph in zip(files, graphs, strict=True):
        counts = (len(graph.input), len(graph.output), len(graph.node))
        stored = (entry for tensor in graph.initializer for entry in tensor.external_data)
        elsewhere = [int(entry.value) for entry in stored if entry.key == "length"]
        sizes = path.stat().st_size, sum(elsewhere)
        table.add_row(path.name, *map(str, counts), *map(size, sizes))
    return [table] if len(files) > 1 else [table, "", _values(graphs[0]), "", _operators(graphs[0])]


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise InputError(
            "the ONNX file cannot be read", place=str(path), found=str(error)
        ) from error


def _values(graph: Any) -> Table:
    from onnx import TensorProto

    table = plain_table("", "name", "type", "shape")
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            shape = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
            dtype = TensorProto.DataType.Name(tensor.elem_type).lower()
            table.add_row(kind, value.name, dtype, f"[{shape}]")
    return table


def _operators(graph: Any) -> Table:
    table = plain_table("operator", "nodes", right=("nodes",))
    for operator, count in Counter(node.op_type for node in graph.node).most_common():
        table.add_row(operator, str(count))
    return table
