"""Programs that would run code are refused before torch opens them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachegraph.compiler import program_files
from cachegraph.compiler.program_files import refuse_code
from cachegraph.compiler.sources import open_model
from cachegraph.errors import ModelError


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 * x.shape[0] + 1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "scaled.pt2"
    shapes = ({0: torch.export.Dim.AUTO},)
    made = torch.export.export(Scaled().eval(), (torch.randn(2, 4),), dynamic_shapes=shapes)
    torch.export.save(made, path)
    return path


def changed(
    source: Path,
    target: Path,
    change: Callable[[Any], Any],
    instead: Mapping[str, io.BytesIO] = MappingProxyType({}),
) -> Path:
    """A copy whose JSON files went through a change, and some others are something else."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(".json"):
                content = json.dumps(walked(json.loads(content), change)).encode()
            end = name.partition("/data/")[2]
            new.writestr(name, instead[end].getvalue() if end in instead else content)
    return target


def walked(data: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(data, list):
        return [walked(item, change) for item in data]
    if isinstance(data, dict):
        return {key: walked(item, change) for key, item in change(data).items()}
    return data


def test_a_program_as_torch_writes_it_passes(program: Path, tmp_path: Path) -> None:
    refuse_code(program)
    refuse_code(changed(program, tmp_path / "same.pt2", lambda data: data))
    assert open_model(str(program), need_inputs=False).model(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch hacked')",
        "(lambda: 1)()",
        "Symbol('s0').__class__",
        "[x for x in ()]",
        "open('hacked', 'w')",
        "Symbol('s0'",
    ],
)
def test_expressions_that_are_code_are_refused(program: Path, tmp_path: Path, text: str) -> None:
    bad = changed(
        program, tmp_path / "bad.pt2", lambda d: d | ({"expr_str": text} if "expr_str" in d else {})
    )
    with pytest.raises(ModelError, match=r"torch would run code.*the expression"):
        open_model(str(bad), need_inputs=False)
    assert not Path("hacked").exists()


def test_pickles_are_refused(program: Path, tmp_path: Path) -> None:
    bad = changed(
        program,
        tmp_path / "bad.pt2",
        lambda d: d | ({"use_pickle": True} if "use_pickle" in d else {}),
    )
    with pytest.raises(ModelError, match="a tensor that is pickled"):
        open_model(str(bad), need_inputs=False)


@pytest.mark.parametrize(
    "target", ["torch.os.system", "torchos.os.system", "_operator.call", "torch.ops.load_library",
               "torch.ops.load_library.__call__", "math.os"],
)  # fmt: skip
def test_calls_of_anything_but_operators_are_refused(
    program: Path, tmp_path: Path, target: str
) -> None:
    bad = changed(
        program, tmp_path / "bad.pt2", lambda d: d | ({"target": target} if "target" in d else {})
    )
    with pytest.raises(ModelError, match=f"torch would run code.*the call of '{target}'"):
        open_model(str(bad), need_inputs=False)


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0"])
def test_objects_are_refused_whether_or_not_it_says_that_they_are_pickled(
    program: Path, tmp_path: Path, name: str
) -> None:
    entry = {"path_name": name, "is_param": False, "use_pickle": False, "tensor_meta": None}
    bad = changed(
        program, tmp_path / "bad.pt2", lambda d: {"config": {"c": entry}} if "config" in d else d
    )
    with pytest.raises(ModelError, match=f"the object '{name}', which is pickled"):
        open_model(str(bad), need_inputs=False)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("harm",))


def test_example_inputs_that_run_code_are_refused(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch tries them without running anything first, and then runs it."""
    file = io.BytesIO()
    torch.save(((Harmful(),), {}), file)
    bad = changed(program, tmp_path / "bad.pt2", lambda d: d, {"sample_inputs/model.pt": file})
    with pytest.raises(ModelError, match="a pickle of more than tensors"):
        open_model(str(bad), need_inputs=False)
    assert "harm" not in capsys.readouterr().out


def test_compiled_code_is_refused(program: Path, tmp_path: Path) -> None:
    bad = changed(program, tmp_path / "bad.pt2", lambda d: d)
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("scaled/data/aotinductor/model/model.so", b"code")
    with pytest.raises(ModelError, match=r"model\.so: .*found compiled code"):
        open_model(str(bad), need_inputs=False)


def test_what_is_too_long_to_be_looked_at_is_refused(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_files, "_LARGEST", 100)
    with pytest.raises(ModelError, match="bytes, which no program has"):
        open_model(str(program), need_inputs=False)


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "no.pt2").write_bytes(b"no archive")
    with pytest.raises(
        ModelError, match=r"not a readable torch.export program; found BadZipFile: File is not"
    ):
        open_model(str(tmp_path / "no.pt2"), need_inputs=False)
