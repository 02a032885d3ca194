#!/bin/sh
# See EMANet learn, in a few minutes on two CPU cores: generate a toy data set,
# train a small network on it, evaluate it, predict images.
#     sh demo.sh [KEY=VALUE ...]          # such as ITER_MAX=50 or DEVICES=0
set -eu
cd "$(dirname "$0")"
for word in "$@"; do
    case $word in
        [A-Z]*=*) ;;
        *) echo "demo.sh: $word: only KEY=VALUE words are taken here" >&2
            exit 2 ;;
    esac
done
. ./setup.sh

set -- DATA_ROOT=data/toy TRAIN_SPLIT=train MODEL_DIR=demo/models \
    LOG_DIR=demo/logdir N_CLASSES=6 N_LAYERS=18 STEM=plain PRETRAINED= \
    STRIDE=8 EM_CHANNELS=256 BN_MOM=0.1 LR=0.01 CROP_SIZE=97 BATCH_SIZE=4 \
    SCALES=0.75,1,1.25 ITER_MAX=300 ITER_VAL=100 NUM_WORKERS=1 \
    DEVICES=-1 "$@"

python prepare.py toy
python train.py "$@"
python eval.py demo/models/final.pth "$@"
python predict.py data/toy/JPEGImages/toy_000[0-7].jpg \
    demo/models/final.pth --to demo/predictions "$@"

cat << 'TEXT'

Look at the overlays in demo/predictions. Then:
  sh tensorboard.sh demo              the curves of this run
  python prepare.py voc               download PASCAL VOC and SBD
  python train.py                     train on them by the settings.py recipe
TEXT
