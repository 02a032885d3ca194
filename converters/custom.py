"""One's own images, with a folder of masks or with annotated outlines.

What they were is recorded in prepared.json, so that a later run converts what
is new or has changed. Images stay in the split that they were in.
"""
import contextlib
import os
import shlex
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

import utils
from converters import annotations, layout, masks, polygons
from lib import images

GIB_PER_IMAGE = 1.2          # of ResNet-50 at a crop of 513, in float32


def convert(args):
    """Convert your own images and masks: train, val.

    IMAGES: a folder of images. MASKS: a folder of masks, each named as its
    image is, of class numbers (palette or grey; 255 is void) or of colours
    that --classes or CVAT's labelmap.txt names; or outlines: a JSON file in
    COCO's format, a folder of labelme's JSON or of YOLO's polygons. Run
    again, it converts what is new or has changed.
    """
    is_outlines = annotations.is_annotations(args.masks)
    check_options(args, is_outlines)
    root, options = args.to, record_options(args)
    stamp = layout.read_stamp(root, 'custom', options)
    if is_outlines:
        named = args.classes and images.read_class_file(args.classes)
        classes, sources, labels = annotations.read(args, named)
    else:
        named = masks.read_classes(args)
        classes, sources, labels = masks.read(args, named)
    if len(labels) < 2:
        raise utils.UserError(
            f'{args.images} has {utils.plural(len(labels), "image")} with a '
            f'mask; a split into train and val needs 2')
    record = record_sources(args, (classes, named), sources, labels)
    classes = update_classes(root, stamp, record, classes)
    lists = read_lists(root)
    if not layout.is_ready(root, 'custom', options, record):
        remove_stale(root, stamp, record, 'label' if is_outlines else 'mask')
        lists = split_images(labels, args.val, args.seed, lists)
        layout.begin(root, 'custom', options, classes, record)
        convert_files(root, sources, labels, classes[1], is_outlines)
        layout.finish(root, 'custom', options, lists, record)
        if stamp:
            utils.log('networks trained before have not seen this: '
                      'train into another MODEL_DIR and LOG_DIR, or run sh '
                      'clean.sh first')
    report_classes(lists, classes[0], {
        name: {0, *(c for c, _ in label[1])} if is_outlines else
        {*label[1].values()} for name, label in labels.items()})
    print_commands(args, len(classes[0]), len(lists['train']), sources)


def check_options(args, is_outlines):
    """Raise UserError for options that cannot be, or not together."""
    if not 0 < args.val < 1:
        raise utils.UserError(f'--val {args.val}: the share of val is between '
                              f'0 and 1, such as 0.2')
    if args.seed < 0:
        raise utils.UserError(f'--seed {args.seed}: a seed is 0 or more')
    given = ([f'--white {args.white}'] * bool(args.white)
             + [f'--suffix {args.suffix}'] * bool(args.suffix)
             + ['--by-colour'] * args.by_colour)
    if is_outlines and given:
        raise utils.UserError(f'{" ".join(given)}: this is for a folder of '
                              f'masks, and {args.masks} has outlines; leave '
                              f'it out')


def record_options(args):
    """Return the options as prepared.json keeps them."""
    return {key: getattr(args, key) for key in (
        'by_colour', 'white', 'suffix', 'val', 'seed')} | {
        key: os.path.abspath(getattr(args, key)) for key in (
            'images', 'masks')}


# ------------------------------------------------- what has changed
def record_sources(args, meaning, sources, labels):
    """Return what prepared.json keeps of the sources, to tell later what has
    changed: {'classes': hash of what values mean, 'images': {ID: "file bytes
    time size"}, 'labels': {ID: "file bytes time", or the hash of outlines}}.
    """
    def describe_file(path, folder):
        try:
            info = os.stat(path)
        except OSError as error:                # a link to nowhere
            raise utils.UserError(f'{path} cannot be read ({error.strerror})'
                                  f'; mend it or remove it') from None
        return (f'{os.path.relpath(path, folder)} {info.st_size} '
                f'{info.st_mtime_ns}')

    def get_hash(value):
        return f'{zlib.crc32(repr(value).encode()):08x}'
    return {'classes': get_hash(meaning),
            'images': {name: f'{describe_file(path, args.images)} {h}x{w}'
                       for name, (path, (h, w)) in sources.items()},
            'labels': {name: describe_file(label[0], args.masks)
                       if isinstance(label[0], str) else get_hash(label)
                       for name, label in labels.items()}}


def update_classes(root, stamp, record, classes):
    """Return the classes of root's classes.txt, which may have been edited,
    where those of the sources are as before; else log how they differ."""
    path = os.path.join(root, 'classes.txt')
    if not os.path.isfile(path):
        return classes
    was = stamp.get('sources', {}).get('classes')
    if was == record['classes']:
        return images.read_class_file(path)
    before, now = images.read_class_file(path)[0], classes[0]
    if before != now:
        utils.log(f'the classes were {", ".join(before)}; they are now '
                  f'{", ".join(now)} (N_CLASSES={len(now)}): train a new '
                  f'network')
    elif was:
        utils.log('the colours of the classes changed')
    return classes


def read_lists(root):
    """Return {split: IDs} of the lists of train and val that there are."""
    paths = {split: os.path.join(root, layout.LISTS, f'{split}.txt')
             for split in ('train', 'val')}
    return {split: images.read_ids(path)
            for split, path in paths.items() if os.path.isfile(path)}


def remove_stale(root, stamp, record, noun):
    """Remove the images and labels whose source has changed or is gone, to be
    converted anew, and log what they are; noun: what labels are made of."""
    before = stamp.get('sources')
    if not before:
        names = {name for split in read_lists(root).values() for name in split}
        if names:
            utils.log(f'{root} has no record of its sources: all is '
                      f'converted anew')
        before = {key: dict.fromkeys(names) for key in ('images', 'labels')}
    was, now = before['images'], record['images']
    new, gone = now.keys() - was.keys(), was.keys() - now.keys()
    changed = {key: {name for name in before[key].keys() & record[key].keys()
                     if before[key][name] != record[key][name]}
               for key in ('images', 'labels')}
    if stamp.get('sources') and (new or gone or any(changed.values())):
        utils.log(f'{root}: ' + ', '.join(
            f'{utils.plural(len(names), kind)} {verb[len(names) > 1]}'
            for names, kind, verb in (
                (new, 'image', ('is new', 'are new')),
                (changed['images'], 'image', ('changed', 'changed')),
                (changed['labels'], noun, ('changed', 'changed')),
                (gone, 'image', ('is gone', 'are gone')))
            if names) + ': converting them')
    if before.get('classes') != record['classes']:
        changed['labels'] = before['labels'].keys()
    for names, where in ((gone | changed['images'], layout.image_path),
                         (gone | changed['labels'], layout.label_path)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(where(root, name))


def split_images(names, share, seed, before):
    """Return {'train': IDs, 'val': IDs}, at least one each, of which val has
    that share; images of `before`, such lists, stay where they were, since
    val shall not have what a network was trained on."""
    train = [name for name in before.get('train', ()) if name in names]
    val = [name for name in before.get('val', ())
           if name in names and name not in {*train}]
    new = sorted(names.keys() - {*train, *val})
    order = np.random.default_rng(seed).permutation(new).tolist()
    n_val = min(max(1, round(share * len(names))), len(names) - 1)
    n_val = max(0, n_val - len(val))            # of the new ones
    if (train or val) and new:
        utils.log(f'images stay in their split; of '
                  f'{utils.plural(len(new), "new image")} '
                  f'{min(n_val, len(new))} in val')
    train, val = train + order[n_val:], val + order[:n_val]
    if not val:
        val.append(train.pop())
        utils.log(f'val has none of its images left: it gets {val[0]} of '
                  f'train; train a new network')
    if not train:
        train.append(val.pop())
    return {'train': train, 'val': val}


# ------------------------------------------------- images and labels
def convert_files(root, sources, labels, colours, is_outlines):
    """Write what is not there yet of the images and labels."""
    write = polygons.write_label if is_outlines else masks.convert_mask
    layout.run_jobs([(write, layout.label_path(root, name), *label, colours)
                     for name, label in labels.items()]
                    + [(convert_image, layout.image_path(root, name), *source)
                       for name, source in sources.items()], 'convert')


def convert_image(path, source, size):
    """Write an image, rotated as its mask of size (H, W) is; a JPEG that
    needs no rotation is copied byte for byte."""
    try:
        with Image.open(source) as image:
            image.load()
            upright = image.getexif().get(images.ORIENTATION, 1) == 1
            turned = image if upright else ImageOps.exif_transpose(image)
            if size not in (image.size[::-1], turned.size[::-1]):
                raise utils.UserError(
                    f'{source} cannot be used ({image.size[0]} x '
                    f'{image.size[1]} pixels, its mask {size[1]} x {size[0]})')
            if turned.size[::-1] != size:
                turned = image
            if image.mode[0] == 'I' or image.mode == 'F':
                raise utils.UserError(f'{source} has more than 8 bits a '
                                      f'pixel; save it with 8')
            if turned is not image or image.format != 'JPEG' or (
                    image.mode not in ('RGB', 'L')):
                layout.save_jpeg(turned, path)
                return
    except images.UNREADABLE:
        raise utils.UserError(f'{source} cannot be used: it is damaged, or '
                              f'of no known format') from None
    with open(source, 'rb') as file:
        layout.write_bytes(path, file.read())


# ------------------------------------------------- what to do next
def report_classes(lists, names, present):
    """Print in how many images of each split a class occurs, and warn of one
    that a split lacks; present: {ID: classes}."""
    counts = {split: [sum(i in present.get(ID, ()) for ID in IDs)
                      for i in range(len(names))]
              for split, IDs in lists.items()}
    width = max(map(len, (*names, 'images with')))
    utils.log('\n'.join(
        f'{name:{width}}' + ''.join(f'{x:>8}' for x in row)
        for name, *row in (('images with', *counts),
                           *zip(names, *counts.values()))))
    for split, row in counts.items():
        lacking = [name for name, n in zip(names, row) if not n]
        if lacking:
            verb = 'learned' if split == 'train' else 'scored'
            utils.log(f'warning: not in {split}, so not {verb}: '
                      f'{", ".join(lacking)}')


def print_commands(args, n_classes, n_train, sources):
    """Print the commands to train, to score and to predict."""
    sides = [max(size) for _, size in sources.values()]
    apart = (not os.path.samefile(args.images, args.masks) and all(
        os.path.dirname(path) == args.images.rstrip('/')
        for path, _ in sources.values()))
    folder = args.images if apart else os.path.join(args.to, 'JPEGImages')
    utils.log(
        f'To train on this machine, score, and predict:\n'
        f'python train.py DATA_ROOT={shlex.quote(args.to)} TRAIN_SPLIT=train '
        f'N_CLASSES={n_classes} \\\n'
        f'    {suggest_settings(n_train, int(np.median(sides)))}\n'
        f'python eval.py\n'
        f'python predict.py {shlex.quote(folder)} --to predictions')


def suggest_settings(n_train, side):
    """Return KEY=VALUE words for so many images, the longer side of which has
    so many pixels: a network and a batch that fit this machine.

    On two slow cores the small network takes ten minutes for its 600 steps.
    """
    def crop_size(most, stride):
        return min(most, -(-(side - 1) // stride) * stride + 1)
    crop, free = crop_size(513, 8), 0
    with contextlib.suppress(RuntimeError):         # a GPU that is in use
        if torch.cuda.is_available():
            free = torch.cuda.mem_get_info()[0] / 2 ** 30 - 2
    batch = min(16, n_train, int(free / (GIB_PER_IMAGE * (crop / 513) ** 2)))
    if batch > 1:
        return (f'N_LAYERS=50 STEM=plain CROP_SIZE={crop} BATCH_SIZE={batch} '
                f'BN_MOM=0.1 LR=0.01 ITER_MAX=4000'
                + ' DEVICES=0' * (torch.cuda.device_count() > 1))
    return (f'N_LAYERS=18 STEM=plain STRIDE=16 CROP_SIZE={crop_size(193, 16)} '
            f'BATCH_SIZE={min(4, n_train)} BN_MOM=0.1 LR=0.01 ITER_MAX=600')
