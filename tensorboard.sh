#!/bin/sh
# Show this folder's log in TensorBoard, or with a folder of experiments all
# of them side by side: sh tensorboard.sh [DIR] [tensorboard's own options].
# DIR may be a folder of logs, too.
# It listens on localhost; --bind_all or --host tells it otherwise.
set -eu
cd "$(dirname "$0")"
here=.
case ${1:-} in
    '' | -*) ;;
    *) here=$1; shift ;;
esac
[ -d "$here" ] || { echo "tensorboard.sh: $here: no such folder" >&2; exit 2; }
[ ! -d .venv ] || PATH=$PWD/.venv/bin:$PATH
python=$(command -v python || command -v python3)

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM
link() {    # the log of the experiment in folder $1, under the folder's name
    log=$(cd "$1" && "$python" -c 'import settings; print(settings.LOG_DIR)' \
        2> /dev/null) || {      # another project's, or it is being edited
        echo "tensorboard.sh: $1: its settings.py has no LOG_DIR" >&2
        return 0
    }
    path=$(cd "$1" && cd "$log" 2> /dev/null && pwd) || return 0
    ln -s "$path" "$logs/$(basename "$(cd "$1" && pwd)")"
}
if [ -f "$here/settings.py" ]; then
    link "$here"
else
    for settings in "$here"/*/settings.py; do
        [ ! -f "$settings" ] || link "$(dirname "$settings")"
    done
fi
if [ -z "$(ls "$logs")" ]; then
    [ -n "$(find "$here/" -name 'events.out.tfevents.*' | head -n 1)" ] || {
        echo "tensorboard.sh: $here holds no log; train first" >&2
        exit 2
    }
    ln -s "$(cd "$here" && pwd)" "$logs/$(basename "$here")"
fi
"$python" -m tensorboard.main --logdir "$logs" "$@"
