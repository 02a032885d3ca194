#!/bin/sh
# Remove the checkpoints and the logs of this folder's last run, and nothing
# else: no data, no downloaded weights, no predictions, no results.csv.
set -eu
cd "$(dirname "$0")"
python=$(command -v python || command -v python3)
models=$("$python" -c 'import settings; print(settings.MODEL_DIR)')
log=$("$python" -c 'import settings; print(settings.LOG_DIR)')

for name in latest best final 'step_[0-9]*'; do
    # shellcheck disable=SC2086  # $name is a pattern
    rm -f -- "$models"/$name.pth "$models"/$name.pth.tmp
done
rm -f -- "$log"/log.csv "$log"/settings.json "$log"/eval.json \
    "$log"/samples.png "$log"/confusion.png "$log"/classes.png \
    "$log"/events.out.tfevents.*
if [ -d "$log" ]; then
    rmdir -- "$log" 2> /dev/null || true    # it may hold files of the user
fi
