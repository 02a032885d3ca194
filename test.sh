#!/bin/sh
# Set up, lint, and run the quick tests, two at a time; with --long, the long
# ones instead. Further words are pytest's: sh test.sh -k network
set -eu
cd "$(dirname "$0")"
REQUIREMENTS=requirements-dev.txt
. ./setup.sh
which='not long'
for word in "$@"; do
    shift
    case $word in
        --long) which=long ;;
        *) set -- "$@" "$word" ;;
    esac
done
python -m ruff check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest tests -q -n 2 --dist worksteal -m "$which" "$@"
