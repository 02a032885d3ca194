#!/bin/sh
# Set up, then run the tests; words are pytest's: sh test.sh -k network
set -eu
cd "$(dirname "$0")"
. ./setup.sh
exec python -m pytest tests -q "$@"
