#!/usr/bin/env bash
# Installs what is needed, then runs the demonstration; arguments go to tools/demo.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/tools/demo.py" "$@"
