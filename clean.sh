#!/bin/sh
# Remove the checkpoints and the log of the run in LOG_DIR, and nothing else: no
# data, no downloaded weights, no predictions, no results.csv.
#     sh clean.sh [LOG_DIR=DIR]           # as given to train.py
set -eu
cd "$(dirname "$0")"
[ ! -d .venv ] || PATH=$PWD/.venv/bin:$PATH
exec "$(command -v python || command -v python3)" -m tools.clean "$@"
