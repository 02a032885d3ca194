#!/bin/sh
# Make a sibling experiment: sh fork.sh NAME copies the project to ../NAME and
# links data, downloaded weights and .venv; no logs, no checkpoints.
# ../NAME/forked_from.txt records the parent, its commit and the hash of each
# code file; `sha256sum -c --quiet forked_from.txt` lists what was edited.
set -eu
cd "$(dirname "$0")"
[ $# -eq 1 ] || { echo 'usage: sh fork.sh NAME' >&2; exit 2; }
case $1 in
    */* | . | .. | -* | '')
        echo "fork.sh: '$1': give a name for the folder beside this one" >&2
        exit 2 ;;
esac
to=../$1
if [ -e "$to" ] || [ -L "$to" ]; then
    echo "fork.sh: $to exists; choose another name" >&2
    exit 2
fi
mkdir "$to" 2> /dev/null || {
    echo "fork.sh: $to cannot be made; may you write to $(cd .. && pwd)?" >&2
    exit 1
}
trap 'rm -rf "$to"' EXIT        # half a fork is none
trap 'exit 130' INT TERM

mkdir "$to/models"
for file in ./*.py ./*.sh ./*.txt ./*.md ./*.toml ./*.ini LICENSE .gitignore \
    .ci .github classes converters docs lib lists recipes tests tools; do
    [ ! -e "$file" ] || cp -R -- "$file" "$to/"
done
find "$to" -name __pycache__ -prune -exec rm -rf {} +
for file in data .venv models/*; do
    case $file in
        */latest.pth | */best.pth | */final.pth | */step_[0-9]*.pth) ;;
        data | .venv | *.pth | *.safetensors)
            [ ! -e "$file" ] || ln -s "$(readlink -f "$file")" "$to/$file" ;;
        *.md) cp -- "$file" "$to/$file" ;;
    esac
done

{
    printf '# parent: %s\n' "$(basename "$(pwd)")"
    if [ -e forked_from.txt ] && [ ! -e .git ]; then
        tail -n +2 forked_from.txt      # a fork of a fork: the first commit
    else
        commit=$(git ls-files --error-unmatch utils.py > /dev/null 2>&1 &&
            git describe --always --dirty --abbrev=12) || commit=unknown
        echo "# commit: $commit"
        hash=$(command -v sha256sum || echo 'shasum -a 256')
        # shellcheck disable=SC2086  # $hash may hold options
        (cd "$to" && find . -name '*.py' ! -path ./settings.py \
            ! -path './tests/*' -exec $hash {} + | sort -k 2)
    fi
} > "$to/forked_from.txt"
trap - EXIT
echo "$to is ready: edit its settings.py, then python train.py;" \
    "diff settings.py '$to/settings.py' shows what it changes"
