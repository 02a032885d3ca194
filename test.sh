#!/bin/sh
# Set up, then run the tests, two at a time; words are pytest's:
# sh test.sh -k network
set -eu
cd "$(dirname "$0")"
. ./setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest tests -q -n 2 --dist worksteal "$@"
