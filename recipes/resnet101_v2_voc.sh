#!/bin/sh
# VOC val from torchvision's newer backbone weights (IMAGENET1K_V2), with the
# plain stem, a longer schedule, a lower weight decay and averaged weights. No
# figure is published for this recipe; ours: not run.
#     python prepare.py voc
#     sh recipes/resnet101_v2_voc.sh [KEY=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

python train.py STEM=plain PRETRAINED=resnet101-cd907fc2 ITER_MAX=60000 \
    SCHEDULE=cosine WARMUP=1500 WEIGHT_DECAY=2e-5 AVERAGE=0.999 "$@"
python eval.py "$@"
