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
    *) root=$1; shift ;;
esac
[ -d "$root" ] || { echo "tensorboard.sh: $root: no such folder" >&2; exit 2; }
[ ! -d .venv ] || PATH=$PWD/.venv/bin:$PATH
python=$(command -v python || command -v python3)

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM
link() {    # the log of the experiment in folder $1, under the folder's name
    log=$(cd "$1" && "$python" -c 'import settings; print(settings.LOG_DIR)' \
        2> /dev/null) || {      # of another project, or being edited
        echo "tensorboard.sh: $1: its settings.py has no LOG_DIR" >&2
        return 0
    }
    path=$(cd "$1" && cd "$log" 2> /dev/null && pwd) || return 0
    ln -s "$path" "$logs/$(basename "$(cd "$1" && pwd)")"
}
if [ -f "$root/settings.py" ]; then
    link "$root"
else
    for settings in "$root"/*/settings.py; do
        [ ! -f "$settings" ] || link "$(dirname "$settings")"
    done
fi
if [ -z "$(ls "$logs")" ]; then
    [ -n "$(find "$root/" -name 'events.out.tfevents.*' | head -n 1)" ] || {
        echo "tensorboard.sh: $root holds no log; train first" >&2
        exit 2
    }
    ln -s "$(cd "$root" && pwd)" "$logs/$(basename "$root")"
fi
"$python" -m tensorboard.main --logdir "$logs" "$@"
