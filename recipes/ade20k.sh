#!/bin/sh
# ADE20K val, 150 classes. mIoU: none in the paper; ours: not run. Its schedule
# is longer than VOC's, as is usual for this set: 160,000 steps of 16 crops.
#     python prepare.py ade20k
#     sh recipes/ade20k.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py DATA_ROOT=data/ade20k TRAIN_SPLIT=train N_CLASSES=150 \
    ITER_MAX=160000 "$@"
python eval.py "$@"
