"""Writes the archive for the VOC test server: VAL_SPLIT's predicted masks.

    python -m tools.submit [CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT is models/final.pth if not named. Writes a mask an image into
results/VOC2012/Segmentation/comp6_test_cls, in VOC's palette and at the
image's own size, and all of them into results.tgz. The split needs no labels.
"""
import argparse
import os
import sys
import tarfile

import numpy as np
from PIL import Image

import eval
import heads
import settings
import utils
from dataset import Segmentation
from lib import distributed
from lib.checkpoint import find_checkpoint
from lib.images import UNREADABLE, save_label, voc_palette, writing
from lib.recorded import adopt_data

FOLDER = 'results/VOC2012/Segmentation/comp6_test_cls'
ARCHIVE = 'results.tgz'


def submit(net):
    """Write the masks of VAL_SPLIT, which all processes share, and the
    archive; raise UserError where an image is missing or unreadable."""
    data = Segmentation(settings.VAL_SPLIT, False, labelled=False)
    sizes = data.image_sizes()          # what can fail is tried before
    size_of = dict(zip(data.ids, sizes))
    for preds, _, ids in eval.predictions(net, data):
        for pred, name in zip(preds.cpu().numpy(), ids, strict=True):
            with writing(mask_path(name)):      # sub/a has a folder, too
                height, width = size_of[name]
                save_label(np.ascontiguousarray(pred[:height, :width]),
                           mask_path(name), voc_palette())
    distributed.gather(None)            # until all processes are here
    if utils.rank() == 0:
        pack(data.ids, sizes)
    utils.log(f'{utils.plural(len(data), "mask")} of {data.split}: in '
              f'{FOLDER}, and in {ARCHIVE} for the server')


def mask_path(name):
    """Return the path of an image's mask."""
    return os.path.join(FOLDER, f'{name}.png')


def pack(ids, sizes):
    """Write the archive of the masks of all ids, sizes [(H, W)].

    Raises UserError, and leaves an archive that was there before, where a
    mask is not as it was written.
    """
    bar = utils.progress(ids, desc='pack', unit='mask', leave=False)
    with utils.atomic_write(ARCHIVE) as part, tarfile.open(
            part, 'w:gz') as tar:
        for name, size in zip(bar, sizes, strict=True):
            fault = find_fault(mask_path(name), size)
            if fault:
                raise utils.UserError(f'{mask_path(name)} {fault}; {ARCHIVE} '
                                      f'was not written. Run again, alone '
                                      f'in this folder')
            tar.add(mask_path(name), filter=_without_owner)


def find_fault(path, size):
    """Return in words what is wrong with the mask of an image of size (H, W),
    '' if nothing."""
    try:
        with Image.open(path, formats=('PNG',)) as image:
            mode, label = image.mode, np.array(image)
            palette = image.getpalette()
    except UNREADABLE as error:
        return f'cannot be read ({type(error).__name__})'
    if mode != 'P' or palette != voc_palette().ravel().tolist():
        return 'does not have the VOC palette'
    if label.shape != size:
        return (f'has {label.shape[1]} x {label.shape[0]} pixels, the image '
                f'{size[1]} x {size[0]}')
    if label.max() >= settings.N_CLASSES:
        return f'has the class {label.max()}, of {settings.N_CLASSES}'
    return ''


def _without_owner(member):
    """Return a member of the archive without its owner's name."""
    member.uid = member.gid = 0
    member.uname = member.gname = ''
    return member


def main():
    """Predict VAL_SPLIT by the checkpoint that the command line names."""
    parser = utils.make_parser(__doc__, settings.describe())
    parser.add_argument('checkpoint', nargs='?', help=argparse.SUPPRESS)
    args = parser.parse_args(settings.override(sys.argv[1:]))
    path = find_checkpoint(args.checkpoint)
    device = distributed.join(distributed.pick_devices_for(path))
    utils.log(f'device: {distributed.describe_device(device)}, processes: '
              f'{utils.world()}')
    net, checkpoint = heads.load_network(path, device)
    adopt_data(checkpoint, path)
    submit(net)
    distributed.leave(0)


if __name__ == '__main__':
    utils.run_main(main)
