"""Segments pictures: a palette mask and an overlay with a legend for each.

    python predict.py FILE... [CHECKPOINT.pth] [--to DIR] [KEY=VALUE ...]

CHECKPOINT is models/final.pth if not named. FILE.jpg becomes DIR/FILE.png
and DIR/FILE.overlay.jpg; DIR is `predictions` if not named.
"""
import argparse
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageOps

import dataset
import eval
import settings
import utils


def read_picture(path):
    """Return any picture that Pillow reads as (H, W, 3) uint8 RGB, turned
    upright. Raises ValueError."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert('RGB'))
    except dataset.UNREADABLE as error:
        raise ValueError(f'{path} cannot be read as a picture ({error})'
                         ) from None


@torch.no_grad()
def segment(net, image, device):
    """Return the class of each pixel, (H, W) uint8, of a picture (H, W, 3)
    uint8; scales and flip as EVAL_SCALES and EVAL_FLIP say.

    net: what eval.prepared gives."""
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
    pred = eval.classify(net, dataset.normalise(batch, device),
                         settings.EVAL_SCALES, settings.EVAL_FLIP)
    return pred[0].cpu().numpy()


def outputs(files, folder):
    """Return {file: path without ending}; raise ValueError where two files
    would be written to one, FileNotFoundError for a file not there."""
    names = {}
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f'{file} is not there')
        name = os.path.splitext(os.path.basename(file))[0]
        if name in names:
            raise ValueError(f'{names[name]} and {file} would both be '
                             f'written to {name}.png; rename one')
        names[name] = file
    return {file: os.path.join(folder, name) for name, file in names.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.
        RawDescriptionHelpFormatter, usage='predict.py FILE... '
        '[CHECKPOINT.pth] [--to DIR] [KEY=VALUE ...]')
    parser.add_argument('files', nargs='+', help=argparse.SUPPRESS)
    parser.add_argument('--to', default='predictions', metavar='DIR')
    asked = parser.parse_args(settings.override(sys.argv[1:]))
    weights = [file for file in asked.files if file.endswith('.pth')]
    files = [file for file in asked.files if file not in weights]
    if len(weights) > 1 or not files:
        raise ValueError(f'{len(files)} pictures and {len(weights)} '
                         f'checkpoints are named; name pictures, and one '
                         f'checkpoint at most')
    eval.check_settings()
    paths = outputs(files, asked.to)
    device = utils.pick_devices(settings.DEVICES)[0]
    net, checkpoint = eval.load_network(
        eval.find_checkpoint(weights[0] if weights else None), device)
    names, colours = eval.classes_of(checkpoint)
    net = eval.prepared(net)
    os.makedirs(asked.to, exist_ok=True)
    for file, path in utils.progress(paths.items(), desc='predict',
                                     unit='picture'):
        image = read_picture(file)
        pred = segment(net, image, device)
        utils.save_label(pred, f'{path}.png', colours)
        Image.fromarray(eval.overlay(image, pred, names, colours)).save(
            f'{path}.overlay.jpg', quality=92)
    utils.log(f'{len(files)} pictures: masks and overlays are in {asked.to}')


if __name__ == '__main__':
    utils.launch(main)
