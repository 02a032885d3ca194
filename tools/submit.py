"""Writes the archive for a test server: VAL_SPLIT's predicted masks.

    python -m tools.submit [CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT is models/final.pth if not named. The names of its classes tell
which server is meant; classes without names are VOC's if there are 21. Masks
have their images' size. The split needs no labels.

    VOC         results/VOC2012/Segmentation/comp6_test_cls/ID.png, classes in
                VOC's palette; all of them in results.tgz
    Cityscapes  results/Cityscapes/ID_pred_labelIds.png, grey, the official
                ids (road 7 to bicycle 33); all of them in results.zip
"""
import argparse
import collections
import os
import re
import sys
import tarfile
import zipfile

import numpy as np
from PIL import Image

import eval
import heads
import settings
import utils
from converters import cityscapes
from dataset import Segmentation
from lib import distributed, images
from lib.checkpoint import find_checkpoint
from lib.recorded import adopt_data

# name; class_file: of classes/; folder and ending of a mask; archive; ids:
# what a mask holds for class 0, 1, 2, ...; palette: [r, g, b, r, ...], None of
# a grey mask; id: pattern of an image's ID; size: (H, W) of all, None for any
Server = collections.namedtuple('Server', (
    'name', 'class_file', 'folder', 'ending', 'archive', 'ids', 'palette',
    'id', 'size'))
VOC = Server(
    'VOC', 'voc', 'results/VOC2012/Segmentation/comp6_test_cls', '.png',
    'results.tgz', (*range(21),), images.voc_palette().ravel().tolist(),
    '.*', None)
CITYSCAPES = Server(
    'Cityscapes', 'cityscapes', 'results/Cityscapes', '_pred_labelIds.png',
    'results.zip', cityscapes.IDS, None,
    r'(.*/)?[a-z-]+_[0-9]{6}_[0-9]{6}(_leftImg8bit)?', (1024, 2048))


# ------------------------------------------------- servers
def find_server(checkpoint):
    """Return the server whose classes a checkpoint, or else DATA_ROOT, names.

    Raises UserError where there is none.
    """
    root, n = settings.DATA_ROOT, settings.N_CLASSES
    here, _ = images.read_classes(root, n)
    for server in (VOC, CITYSCAPES):
        path = images.class_file(server.class_file)
        names, _ = images.read_class_file(path)
        if names in (here, checkpoint.get('classes')):
            return server
    if here == [str(i) for i in range(21)]:
        return VOC
    shown = ', '.join(here[:3]) + ', ...' * (n > 3)
    raise utils.UserError(f'{root} has {n} classes ({shown}), not those of a '
                          f'test server: classes/voc.txt or '
                          f'classes/cityscapes.txt. If they are, copy that '
                          f'file to {os.path.join(root, "classes.txt")}')


def check_images(data, sizes, server):
    """Raise UserError for an ID that the server cannot know; warn of images
    of other sizes (H, W) than it has."""
    for name in data.ids:
        if not re.fullmatch(server.id, name):
            raise utils.UserError(
                f'{data.split}.txt has the ID {name!r}, which the '
                f'{server.name} server does not know; name images as it does, '
                f'such as berlin_000000_000019')
    odd = [(name, size) for name, size in zip(data.ids, sizes, strict=True)
           if server.size not in (None, size)]
    for name, (height, width) in odd[:1]:
        utils.log(f'warning: {utils.plural(len(odd), "image")} of another '
                  f'size than the {server.name} server expects, '
                  f'{server.size[1]} x {server.size[0]}, such as {name}, '
                  f'{width} x {height}')


# ------------------------------------------------- masks
def submit(net, data, server):
    """Write the masks of a split, which all processes share, and the archive;
    raise UserError where an image is missing or unreadable."""
    sizes = data.image_sizes()          # what can fail is tried before
    check_images(data, sizes, server)
    size_of = dict(zip(data.ids, sizes))
    for preds, _, ids in eval.predictions(net, data):
        for pred, name in zip(preds.cpu().numpy(), ids, strict=True):
            height, width = size_of[name]
            save_mask(pred[:height, :width], mask_path(name, server), server)
    distributed.gather(None)            # until all processes are here
    if utils.rank() == 0:
        pack(data.ids, sizes, server)
    utils.log(f'{utils.plural(len(data), "mask")} of {data.split}: in '
              f'{server.folder}, and in {server.archive} for the '
              f'{server.name} server')


def mask_path(name, server):
    """Return the path of an image's mask."""
    return os.path.join(server.folder, name + server.ending)


def save_mask(pred, path, server):
    """Write classes (H, W) as a server's mask."""
    mask = np.uint8(server.ids)[pred]
    with images.writing(path):          # sub/a has a folder, too
        if server.palette:
            images.save_label(mask, path, np.reshape(server.palette, (-1, 3)))
        else:
            images.save_image(mask, path)


def find_fault(path, size, server):
    """Return in words what is wrong with the mask of an image of size (H, W),
    '' if nothing."""
    try:
        with Image.open(path, formats=('PNG',)) as image:
            mode, mask = image.mode, np.array(image)
            palette = image.getpalette()
    except images.UNREADABLE as error:
        return f'cannot be read ({type(error).__name__})'
    if (mode, palette) != ('P' if server.palette else 'L', server.palette):
        return ('does not have the VOC palette' if server.palette else
                'is not grey, of 8 bits')
    if mask.shape != size:
        return (f'has {mask.shape[1]} x {mask.shape[0]} pixels, the image '
                f'{size[1]} x {size[0]}')
    wrong = mask[~np.isin(mask, server.ids)]
    return (f'has the value {wrong.max()}, no class of {server.name}'
            if wrong.size else '')


# ------------------------------------------------- the archive
def pack(ids, sizes, server):
    """Write the archive of the masks of all ids, sizes [(H, W)].

    Raises UserError, and leaves an archive that was there before, where a
    mask is not as it was written.
    """
    bar = utils.progress(ids, desc='pack', unit='mask', leave=False)
    with utils.atomic_write(server.archive) as part, open_archive(
            part, server) as archive:
        for name, size in zip(bar, sizes, strict=True):
            path = mask_path(name, server)
            fault = find_fault(path, size, server)
            if fault:
                raise utils.UserError(f'{path} {fault}; {server.archive} was '
                                      f'not written. Run again, alone in this '
                                      f'folder')
            if isinstance(archive, tarfile.TarFile):
                archive.add(path, filter=_without_owner)
            else:
                archive.write(path, os.path.relpath(path, server.folder))


def open_archive(path, server):
    """Return a new zip or tar.gz, as the server's archive is one."""
    if server.archive.endswith('.zip'):
        return zipfile.ZipFile(path, 'w', strict_timestamps=False)
    return tarfile.open(path, 'w:gz')


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
    data = Segmentation(settings.VAL_SPLIT, False, labelled=False)
    submit(net, data, find_server(checkpoint))
    distributed.leave(0)


if __name__ == '__main__':
    utils.run_main(main)
