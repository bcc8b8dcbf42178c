"""The project itself: packaging, set-up, lint settings, sizes, what tracked files may say."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUFF = PYPROJECT["tool"]["ruff"]["lint"]


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


def tracked_files() -> list[Path]:
    """Every file that is, or would be, in a commit; links are left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    assert listed.returncode == 0, listed.stderr
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


# --- packaging --------------------------------------------------------------------------------


def copy_of_checkout(folder: Path) -> Path:
    """The parts of the checkout that a build reads, so that it leaves nothing behind in it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("cachegraph", "passes", "schedules"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def shipped_files() -> set[str]:
    """What a wheel must hold, as names inside it."""
    names = {"cachegraph/py.typed", "cachegraph/schedules/README.md"}
    for folder, pattern, prefix in (
        ("cachegraph", "**/*.py", ""),  # where the links are followed, the names are the same
        ("cachegraph/report", "page/*", ""),
        ("cachegraph/zoo", "*.safetensors", ""),
        ("passes", "**/*.py", "cachegraph/"),
        ("schedules", "**/*.py", "cachegraph/"),
        ("schedules", "*.yaml", "cachegraph/"),
    ):
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.joinpath(folder).glob(pattern)]
        assert found, f"nothing matches {folder}/{pattern}"
        names.update(prefix + name for name in found)
    return names


def build_sdist(source: Path) -> Path:
    """Builds an sdist from a source folder and gives the folder that it unpacks to."""
    code = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    built = run(sys.executable, "-c", code, source.parent / "sdist", cwd=source)
    assert built.returncode == 0, built.stderr
    [archive] = source.parent.glob("sdist/*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(source.parent / "unpacked", filter="data")
    [folder] = source.parent.joinpath("unpacked").iterdir()
    return folder


@pytest.mark.parametrize("source", ["checkout", "checkout without links", "sdist"])
def test_wheel_holds_exactly_the_product(source: str, tmp_path: Path) -> None:
    tmp_path.joinpath("source").mkdir()
    folder = copy_of_checkout(tmp_path / "source")
    if source == "checkout without links":
        folder.joinpath("cachegraph/passes").unlink()
        folder.joinpath("cachegraph/schedules").unlink()
    if source == "sdist":
        folder = build_sdist(folder)
    built = run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--wheel-dir", tmp_path / "wheel", folder),
    )
    assert built.returncode == 0, built.stderr

    [wheel] = tmp_path.glob("wheel/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert names == shipped_files()

    code = "import cachegraph.passes, cachegraph.schedules; print(cachegraph.passes.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path / "installed")
    wanted = tmp_path / "installed/cachegraph/passes/__init__.py"
    assert (found.returncode, found.stdout.strip()) == (0, str(wanted)), found.stderr


def test_every_package_is_listed_for_the_build() -> None:
    packages = {"cachegraph", "cachegraph.passes", "cachegraph.schedules"}
    for parent, _, names in os.walk(ROOT / "cachegraph"):  # links are not followed
        if "__init__.py" in names:
            packages.add(".".join(Path(parent).relative_to(ROOT).parts))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages


def test_links_of_the_checkout() -> None:
    for name in ("passes", "schedules"):
        assert (ROOT / "cachegraph" / name).readlink() == Path("..", name)


def test_plain_passes_is_refused() -> None:
    found = run(sys.executable, "-c", "import passes")
    assert found.returncode == 1
    assert "ImportError: the folder passes belongs to cachegraph" in found.stderr
    assert "import cachegraph.passes instead" in found.stderr


def test_version_stands_in_pyproject_only() -> None:
    assert importlib.metadata.version("cachegraph") == PYPROJECT["project"]["version"]


# --- set-up -----------------------------------------------------------------------------------


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A venv whose pip writes its arguments to pip.log instead of installing."""
    made = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    assert made.returncode == 0, made.stderr
    [site] = tmp_path.glob("venv/lib/python*/site-packages")
    site.joinpath("pip").mkdir()
    site.joinpath("pip/__init__.py").touch()
    site.joinpath("pip/__main__.py").write_text(
        f"import sys\nopen({str(tmp_path / 'pip.log')!r}, 'a').write(' '.join(sys.argv) + '\\n')\n"
        "sys.exit('hopeless' in sys.argv[-1])\n",
        encoding="utf-8",
    )
    return tmp_path / "venv"


def set_up(venv: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run("bash", ROOT / "tools/setup.sh", cwd=venv, VIRTUAL_ENV=str(venv), **env)


def test_second_setup_installs_nothing(venv: Path, tmp_path: Path) -> None:
    log = tmp_path / "pip.log"

    assert set_up(venv).returncode == 0
    first = log.read_text(encoding="utf-8").splitlines()
    assert len(first) == 2
    assert all("--constraint constraints.txt" in line for line in first)

    again = set_up(venv)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert log.read_text(encoding="utf-8").splitlines() == first

    assert set_up(venv, CACHEGRAPH_EXTRAS="dev").returncode == 0
    assert log.read_text(encoding="utf-8").splitlines()[-1].endswith("--editable .[dev]")


def test_failed_setup_is_not_taken_for_done(venv: Path) -> None:
    assert set_up(venv).returncode == 0
    assert set_up(venv, CACHEGRAPH_EXTRAS="hopeless").returncode == 1
    assert set_up(venv, CACHEGRAPH_EXTRAS="hopeless").returncode == 1
    assert not list(venv.glob("*.sha256"))


def test_setup_refuses_a_venv_of_an_old_python(venv: Path) -> None:
    [site] = venv.glob("lib/python*/site-packages")
    site.joinpath("sitecustomize.py").write_text(
        "import sys\nsys.version_info = (3, 9, 0, 'final', 0)\n", encoding="utf-8"
    )
    refused = set_up(venv)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"setup: the active venv {venv} has Python 3.")
    assert "3.11 or newer is needed; deactivate it and run again" in refused.stderr


def test_setup_refuses_a_venv_that_is_gone(tmp_path: Path) -> None:
    refused = set_up(tmp_path)
    assert refused.returncode == 1
    assert "has no bin/python; deactivate it" in refused.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_setup_refuses_a_venv_that_it_cannot_write(venv: Path) -> None:
    venv.chmod(0o555)
    refused = set_up(venv)
    venv.chmod(0o755)
    assert refused.returncode == 1
    assert "cannot be written to" in refused.stderr


# --- lint settings ----------------------------------------------------------------------------


def is_selected(rule: str) -> bool:
    return any(rule.startswith(chosen) for chosen in RUFF["select"])


def test_every_configured_lint_rule_is_selected() -> None:
    prefix_of_section = {
        "flake8-tidy-imports": "TID",
        "mccabe": "C90",
        "pep8-naming": "N",
        "pydocstyle": "D",
    }
    sections = {name for name, value in RUFF.items() if isinstance(value, dict)}
    assert sections - {"per-file-ignores"} == set(prefix_of_section)

    exceptions = [rule for rules in RUFF["per-file-ignores"].values() for rule in rules]
    for rule in [*prefix_of_section.values(), *RUFF["ignore"], *exceptions]:
        assert is_selected(rule), f"{rule} is configured but not selected"


def test_every_private_module_of_torch_is_banned() -> None:
    banned = set(RUFF["flake8-tidy-imports"]["banned-api"])
    names = [module.name for module in pkgutil.iter_modules(torch.__path__)]
    private = {f"torch.{name}" for name in names if re.match(r"_[^_]", name)}
    assert private <= banned, f"add to pyproject.toml: {sorted(private - banned)}"


def test_lint_bans_imports(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text('"""Text."""\n\nimport passes\nimport torch\n\ntorch._C.f(passes)\n')
    linted = run(
        *(sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251"),
        *("--config", ROOT / "pyproject.toml", "--output-format", "concise", source),
    )
    assert linted.stdout.count("TID251") == 2, linted.stdout + linted.stderr


# --- sizes ------------------------------------------------------------------------------------


def check_size(root: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "tools/check_size.py", root)


def function_of(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small checkout in which everything just fits."""
    for name in ("cachegraph", "passes", "tests"):
        tmp_path.joinpath(name).mkdir()
    tmp_path.joinpath("cachegraph/passes").symlink_to("../passes")
    tmp_path.joinpath("passes/fits.py").write_text("x = 1\n" * 400)
    tmp_path.joinpath("tests/fits.py").write_text(function_of(50))
    return tmp_path


def test_size_counts_each_file_once(tree: Path) -> None:
    checked = check_size(tree)
    assert (checked.returncode, checked.stderr) == (0, "")
    _, _, engine, product = size_budgets()
    assert checked.stdout == f"product: 400 of {product} lines, engine 400 of {engine}\n"


def test_size_names_a_long_file(tree: Path) -> None:
    tree.joinpath("passes/long.py").write_text("x = 1\n" * 401)
    checked = check_size(tree)
    assert checked.returncode == 1
    assert checked.stderr == "passes/long.py:401: file of 401 lines; at most 400, split it\n"


def test_size_names_a_long_function(tree: Path) -> None:
    tree.joinpath("tests/long.py").write_text("\nasync " + function_of(51))
    checked = check_size(tree)
    assert checked.returncode == 1
    assert checked.stderr == "tests/long.py:2: function f of 51 lines; at most 50, split it\n"


def test_size_does_not_count_docstrings(tree: Path) -> None:
    documented = 'def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * 49
    tree.joinpath("tests/documented.py").write_text(documented)
    assert check_size(tree).returncode == 0
    tree.joinpath("tests/documented.py").write_text(documented + "    x = 1\n")
    assert "function f of 51 lines" in check_size(tree).stderr


def fill(folder: Path, lines: int) -> None:
    """Files of so many lines in all, none too long."""
    folder.mkdir(exist_ok=True)
    for start in range(0, lines, 400):
        folder.joinpath(f"from_{start}.py").write_text("x = 1\n" * min(400, lines - start))


def size_budgets() -> tuple[dict[str, int], tuple[str, ...], int, int]:
    """Of each folder, which ones are the engine, all of it, and the product."""
    spec = importlib.util.spec_from_file_location("check_size", ROOT / "tools/check_size.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BUDGETS, module.ENGINE, module.MAX_ENGINE, module.MAX_PRODUCT


def test_size_limits_each_folder(tree: Path) -> None:
    budgets = size_budgets()[0]
    fill(tree / "cachegraph/model", budgets["model"])
    assert check_size(tree).returncode == 0
    tree.joinpath("cachegraph/model/last.py").write_text("x = 1\n")
    checked = check_size(tree)
    assert checked.returncode == 1
    limit = budgets["model"]
    assert checked.stderr == f"model: {limit + 1} lines; at most {limit}\n"


def test_size_wants_a_budget_for_every_folder(tree: Path) -> None:
    fill(tree / "cachegraph/new", 1)
    checked = check_size(tree)
    assert checked.returncode == 1
    assert checked.stderr.startswith("new: a folder without a budget")


def test_size_budgets_are_of_the_folders_that_there_are() -> None:
    budgets, engine, _, _ = size_budgets()
    folders = {path.parent.name for path in ROOT.joinpath("cachegraph").glob("*/__init__.py")}
    assert set(budgets) == folders - {"schedules"} | {"cachegraph"}
    assert {"model", "passes", "compiler"} <= set(engine)
    assert not {"cachegraph", "zoo", "oracle", "cli"} & set(engine)


def test_size_limits_the_engine_and_the_product(tree: Path) -> None:
    budgets, engine, most_of_engine, most = size_budgets()
    for name, lines in budgets.items():
        target = tree / ("cachegraph" if name == "cachegraph" else f"cachegraph/{name}")
        fill(target, lines - (400 if name == "passes" else 0))
    checked = check_size(tree)
    assert checked.returncode == 1
    engine_lines, lines = sum(budgets[name] for name in engine), sum(budgets.values())
    assert checked.stderr.splitlines() == [
        f"engine: {engine_lines} lines; at most {most_of_engine}",
        f"product: {lines} lines; at most {most}",
    ]


# --- folders ----------------------------------------------------------------------------------


def test_the_architecture_is_described_as_it_is_checked() -> None:
    """The table of folders has the rows of the contract, and files that it names are there."""
    [contract] = PYPROJECT["tool"]["importlinter"]["contracts"]
    layers = [set(layer.split(" | ")) - {"_began"} for layer in contract["layers"]]
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("| --- | --- |\n")[2].partition("\n\n")[0]
    rows = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()]
    assert rows == layers
    named = set(re.findall(r"`([\w/]+(?:/|\.(?:py|toml|md)))`", text))
    assert {"tools/check_size.py", "config/problems.py", "tests/bad_schedules/"} <= named
    starts = ROOT, ROOT / "cachegraph"
    assert not {name for name in named if not any((start / name).exists() for start in starts)}


# --- what tracked files may say ---------------------------------------------------------------

# Written apart so that this file does not name them itself.
FORBIDDEN = [
    *("/" + folder + "/" for folder in ("work", "tmp", "root", "opt")),
    *(".".join(host) for host in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))),
    *(".".join(host) for host in (("debian", "org"), ("download", "pytorch", "org"))),
]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in tracked_files():
        if b"\0" in (content := path.read_bytes()):
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            found += [f"{path}:{number}: {text}" for text in FORBIDDEN if text in line]
    assert not found, found


def test_constraints_are_plain_pins() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line[:1] != "#"]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
