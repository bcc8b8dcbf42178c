#!/usr/bin/env bash
# ToCa where streams differ: a FLUX of 4 + 8 blocks and an STDiT3 of 4 + 4, width 768, 2 threads.
#
# Everybody takes a turn in one process, so ratios hold on a machine that others use; wait for a
# quiet one all the same. Reaching 90 % of the limit by FLOPs is the aim, and choosing tokens at
# most 5 % of a partial step, which --choice measures. About 4 and 6 minutes.
#
# Usage: bash tools/benchmarks/toca_streams.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-.}"
python -m cachegraph bench "FLUX(depth=4, depth_single_blocks=8, hidden_size=768, num_heads=6)" \
    --input-size 64 --schedule toca-n4-flux --backend aoti --choice --threads 2 \
    -o "$out/toca-flux-cpu.json"
python -m cachegraph bench "STDiT3(depth=4, hidden_size=768, num_heads=12)" \
    --input-size 24 --schedule toca-opensora --backend aoti --choice --threads 2 --rounds 3 \
    -o "$out/toca-opensora-cpu.json"
