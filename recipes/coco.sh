#!/bin/sh
# COCO in the 21 classes of VOC, the first of the three stages in voc_test.sh.
# mIoU: none in the paper; ours: not run.
#     python prepare.py coco
#     sh recipes/coco.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py DATA_ROOT=data/coco TRAIN_SPLIT=train "$@"
python eval.py "$@"
