#!/bin/sh
# PASCAL Context val, 59 classes and background. mIoU: the paper 53.1; ours:
# not run.
#     python prepare.py context
#     sh recipes/context.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py DATA_ROOT=data/context TRAIN_SPLIT=train N_CLASSES=60 "$@"
python eval.py "$@"
