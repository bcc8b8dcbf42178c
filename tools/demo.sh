#!/usr/bin/env bash
# Installs what is needed, then runs the demonstration; arguments go to tools/demo.py.
set -euo pipefail
# The demo tells how long after this it began to sample; old shells do not know the time.
[ -z "${EPOCHREALTIME:-}" ] || export DEMO_BEGAN="${EPOCHREALTIME/,/.}"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/tools/demo.py" "$@"
