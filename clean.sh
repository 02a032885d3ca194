#!/bin/sh
# Remove the checkpoints and the logs of this folder's last run. Nothing
# else: no data, no downloaded weights, no predictions.
set -eu
cd "$(dirname "$0")"
python=$(command -v python || command -v python3)
models=$("$python" -c 'import settings; print(settings.MODEL_DIR)')
log=$("$python" -c 'import settings; print(settings.LOG_DIR)')

rm -f -- "$models"/latest.pth "$models"/best.pth "$models"/final.pth \
    "$models"/step_[0-9]*.pth "$models"/*.pth.[0-9]*.tmp \
    "$log"/log.csv "$log"/eval.json "$log"/samples.png \
    "$log"/events.out.tfevents.*
if [ -d "$log" ]; then
    rmdir -- "$log" 2> /dev/null || true    # it may hold files of others
fi
