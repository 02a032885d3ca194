#!/bin/sh
# Cityscapes val. mIoU, single-scale: published 81.14 (79.79 without
# LOSS=ohem); ours: not run. EVAL_WINDOW=769 evaluates by sliding window.
#     python prepare.py cityscapes        # says what to download, and where to
#     sh recipes/cityscapes.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py DATA_ROOT=data/cityscapes TRAIN_SPLIT=train N_CLASSES=19 \
    CROP_SIZE=769 LOSS=ohem "$@"
python eval.py "$@"
