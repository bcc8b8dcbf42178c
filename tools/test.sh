#!/usr/bin/env bash
# Everything that must be green, stopping at the first stage that is not; arguments go to pytest.
set -euo pipefail

stage() {
    local name="$1" start="$SECONDS" status=0
    shift
    echo "== $name"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        echo "== $name: FAILED after $((SECONDS - start)) s" >&2
        exit "$status"
    fi
    echo "== $name: $((SECONDS - start)) s"
}

# Two workers of one thread each, so that a small machine is not oversubscribed; a file's tests
# stay together, for they share what they compiled. torch takes its number of threads from here too.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

start="$SECONDS"
echo "== setup"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
echo "== setup: $((SECONDS - start)) s"

cd "$root"
stage "ruff check" python -m ruff check .
stage "ruff format" python -m ruff format --check .
stage "types" python -m mypy
stage "layers" lint-imports --no-cache
stage "size" python tools/check_size.py
stage "pytest" python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
echo "== all green: $SECONDS s"
