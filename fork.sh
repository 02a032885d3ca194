#!/bin/sh
# Make a sibling experiment: sh fork.sh NAME copies the project to ../NAME and
# links data, downloaded weights and .venv; no logs, no checkpoints.
set -eu
cd "$(dirname "$0")"
[ $# -eq 1 ] || { echo 'usage: sh fork.sh NAME' >&2; exit 2; }
case $1 in
    */* | . | .. | -* | '')
        echo "fork.sh: $1: give a name for the folder beside this one" >&2
        exit 2 ;;
esac
[ ! -e "../$1" ] || {
    echo "fork.sh: ../$1 exists; choose another name" >&2
    exit 2
}

here=$(pwd)
to=$here/../$1
mkdir -p "$to/models"
for file in ./*.py ./*.sh ./*.txt ./*.md ./*.toml ./*.ini LICENSE .gitignore \
    .ci .github classes converters docs lib lists recipes tests tools; do
    [ ! -e "$file" ] || cp -R -- "$file" "$to/"
done
find "$to" -name __pycache__ -prune -exec rm -rf {} +
for file in data .venv; do
    [ ! -e "$file" ] || ln -s "$(cd "$file" && pwd -P)" "$to/$file"
done
for file in models/*; do
    case $file in
        */latest.pth | */best.pth | */final.pth | */step_*.pth | *.tmp) ;;
        *.pth) ln -s "$here/$file" "$to/$file" ;;
        *.md) cp -- "$file" "$to/$file" ;;
    esac
done
echo "../$1 is ready: edit its settings.py, then python train.py;" \
    "diff settings.py ../$1/settings.py shows what it changes"
