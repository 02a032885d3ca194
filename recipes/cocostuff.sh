#!/bin/sh
# COCO-Stuff 10k test, 171 classes. mIoU: the paper 39.9; ours: not run.
#     python prepare.py cocostuff
#     sh recipes/cocostuff.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py DATA_ROOT=data/cocostuff TRAIN_SPLIT=train VAL_SPLIT=test \
    N_CLASSES=171 "$@"
python eval.py "$@"
