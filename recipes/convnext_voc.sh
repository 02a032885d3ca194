#!/bin/sh
# EMANet on ConvNeXt-T: VOC val from timm's ImageNet weights, by AdamW. The
# rates are those usual for fine-tuning this encoder. Not run.
#     python -m pip install timm
#     python prepare.py voc
#     sh recipes/convnext_voc.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py BACKBONE=convnext_tiny STRIDE=16 CROP_SIZE=512 MEAN='()' \
    STD='()' OPTIMIZER=adamw LR=1e-3 BACKBONE_LR=0.1 WEIGHT_DECAY=0.05 \
    WARMUP=1500 CLIP_GRAD=5.0 COLOR_JITTER=0.3 AVERAGE=0.999 "$@"
python eval.py "$@"
