#!/usr/bin/env bash
# Installs the pinned dependencies and this project (editable) into the active venv, or into .venv
# which is made if there is none. test.sh and demo.sh source it: it leaves the venv first on PATH
# and the root of the repository in $root.
#
# CACHEGRAPH_EXTRAS  the extras to install; default: dev,diffusers,eval,onnx
# PYTHON             the Python that makes .venv; default: the first of python3.11, python3, ...
#
# A stamp in the venv says what was installed from what, so a second run installs nothing and
# needs no network.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "setup: $*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    # 3.11 comes first: the versions in constraints.txt were found with it.
    local candidate candidates=(python3.11 python3 python3.12 python3.13)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "none of ${candidates[*]} is a Python 3.11 or newer; set PYTHON to one"
}

choose_venv() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        venv="$VIRTUAL_ENV"
        [ -x "$venv/bin/python" ] ||
            fail "the active venv $venv has no bin/python; deactivate it and run again"
        is_new_enough "$venv/bin/python" ||
            fail "the active venv $venv has $("$venv/bin/python" -V 2>&1), 3.11 or newer is needed;" \
                "deactivate it and run again"
        return
    fi
    venv="$root/.venv"
    # A venv that was left half made, or whose Python is gone, is made anew.
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        local base
        base="$(find_python)" || exit 1
        echo "setup: making .venv with $("$base" -V)"
        "$base" -m venv --clear "$venv"
    fi
}

wanted_stamp() {
    # The root is part of it: a venv that serves two checkouts must follow the one in use.
    "$venv/bin/python" - "$root" "$extras" <<'PYTHON'
import hashlib, pathlib, sys

root, extras = sys.argv[1:]
digest = hashlib.sha256(f"{root}\n{extras}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(root, name).read_bytes())
print(digest.hexdigest())
PYTHON
}

install() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    [ -w "$venv" ] ||
        fail "the venv $venv cannot be written to; deactivate it or make it writable"
    echo "setup: installing cachegraph[$extras] into $venv (a minute or more)"
    rm -f "$stamp"
    # setuptools comes first and builds without isolation: pinned, and nothing is fetched twice.
    (
        cd "$root"
        "${pip[@]}" --constraint constraints.txt setuptools
        "${pip[@]}" --constraint constraints.txt --no-build-isolation --editable ".[$extras]"
    )
    echo "$wanted" >"$stamp"
}

extras="${CACHEGRAPH_EXTRAS:-dev,diffusers,eval,onnx}"
choose_venv
stamp="$venv/cachegraph-setup.sha256"
wanted="$(wanted_stamp)"
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] || install
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
