#!/usr/bin/env bash
# Try the oldest and the newest versions that pyproject.toml allows. Slow, and each torch takes
# gigabytes, so it is not part of CI.
#
#     bash tools/test_versions.sh                                # all
#     bash tools/test_versions.sh torch==2.13.0 pydantic==2.10.0 # these, each in a venv of its own
#
# All else is as constraints.txt says. BASE names a site-packages folder whose packages are used
# where a venv has none of its own, so that a venv for pydantic need not hold torch. VENVS names a
# folder where the venvs stay, so that what failed is tried again without installing; TESTS names
# the tests to try in place of all.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
python=${PYTHON:-python3}
base=${BASE:-$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venvs=${VENVS:-$scratch}

wanted=("$@")
if [ $# -eq 0 ]; then
    wanted=(pydantic==2.10.0 typer==0.27.3 torch==2.13.0 torch==2.14.1)
fi
failed=()
for one in "${wanted[@]}"; do
    case $one in
    pydantic*) tests=(tests/config tests/schedule tests/methods/test_methods.py) ;;
    typer*) tests=(tests/cli) ;;
    *) tests=(tests/model tests/graph tests/plan tests/passes tests/runtime) ;;
    esac
    [ -z "${TESTS:-}" ] || read -ra tests <<< "$TESTS"
    echo "== $one"
    venv=$venvs/$one
    if [ ! -d "$venv" ]; then
        "$python" -m venv "$venv"
        echo "$base" > "$venv/$(cd "$venv" && echo lib/python3*/site-packages)/zz_base.pth"
        "$venv/bin/python" -m pip install --quiet "$one"
    fi
    "$venv/bin/python" -m pytest -q -W ignore::DeprecationWarning "${tests[@]}" ||
        failed+=("$one")
    rm -rf "${scratch:?}/$one"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed with ${failed[*]}"
    exit 1
fi
