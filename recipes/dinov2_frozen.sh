#!/bin/sh
# EMANet's head on a frozen DINOv2: for few images and one GPU. The encoder,
# a vision transformer with patches of 14 pixels, is not trained. For VOC; for
# your own set give DATA_ROOT, N_CLASSES, TRAIN_SPLIT and ITER_MAX. Not run.
#     python -m pip install timm
#     python prepare.py voc
#     sh recipes/dinov2_frozen.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py BACKBONE=vit_small_patch14_dinov2 STRIDE=14 CROP_SIZE=518 \
    FREEZE=backbone MEAN='()' STD='()' OPTIMIZER=adamw LR=1e-3 \
    WEIGHT_DECAY=0.01 WARMUP=500 ITER_MAX=10000 BN_MOM=0.01 "$@"
python eval.py "$@"
