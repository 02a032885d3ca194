#!/bin/sh
# Show this folder's log in TensorBoard or, given a folder of experiments, all
# of them side by side: sh tensorboard.sh [DIR] [options of tensorboard].
# DIR may be a folder of logs, too.
# It listens on localhost; --bind_all or --host changes that.
set -eu
cd "$(dirname "$0")"
root=.
case ${1:-} in
    '' | -*) ;;
    /*) root=$1; shift ;;
    *) root=$OLDPWD/$1; shift ;;        # as seen from where it was called
esac
[ -d "$root" ] || { echo "tensorboard.sh: $root: no such folder" >&2; exit 2; }
root=$(cd "$root" && pwd)
[ ! -d .venv ] || PATH=$PWD/.venv/bin:$PATH
python=$(command -v python || command -v python3 || echo python3)
"$python" -c 'import tensorboard' 2> /dev/null || {
    echo 'tensorboard.sh: TensorBoard is not installed; run: . ./setup.sh' >&2
    exit 1
}

logs=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null; rm -rf "$logs"' EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM
"$python" -m lib.experiments "$root" "$logs"    # runs no code of other folders
[ -n "$(ls "$logs")" ] || {
    echo "tensorboard.sh: $root holds no log; train first" >&2
    exit 2
}
# in the background, since only `wait` lets a signal end the script at once
"$python" -m tensorboard.main --logdir "$logs" "$@" &
server=$!
wait "$server"
