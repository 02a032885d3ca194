"""COCO 2017 in VOC's 21 classes, for pretraining."""
import os

import utils
from converters import archives, layout, polygons
from lib import images

SOURCE = {
    'archives': (
        ('http://images.cocodataset.org/annotations/'
         'annotations_trainval2017.zip', '', 253_000_000),
        ('http://images.cocodataset.org/zips/train2017.zip', '',
         19_340_000_000),
        ('http://images.cocodataset.org/zips/val2017.zip', '', 816_000_000)),
    'unpacked': 17_000_000_000,
    'counts': {'train': 118_287, 'val': 5000}}
FILES = {
    'annotations': r'annotations/instances_(train|val)2017\.json',
    'train': r'train2017/([0-9]{12})\.jpg',
    'val': r'val2017/([0-9]{12})\.jpg'}
# the category ids that become class 0, 1, 2, ... of VOC
IDS = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7,
       72)
MIN_PIXELS = 1000           # an image needs more pixels of classes


def convert(args):
    """Convert COCO 2017, in VOC's 21 classes: train, val.

    Images with more than 1,000 pixels of these classes. Where objects overlap
    the first of the file wins; a crowd is void where no object is.
    """
    utils.import_optional('pycocotools.mask')
    root, lists = args.to, {}
    if layout.is_ready(root, 'coco', {}):
        return
    notes, train, val = archives.fetch(SOURCE, args.source, root)
    zips = {'train': train, 'val': val}
    members = {split: dict(found[1:] for found in archives.zip_members(
        path, {split: FILES[split]})) for split, path in zips.items()}
    archives.check_counts(SOURCE, members)
    classes = images.read_class_file(images.class_file('voc'))
    layout.begin(root, 'coco', {}, classes)
    for split, archive in zips.items():
        found = {file[:-4]: item for file, item
                 in read_annotations(notes, split).items()
                 if file[:-4] in members[split] and item[1]}
        layout.run_jobs([
            (polygons.write_label, layout.label_path(root, name), *item,
             classes[1], MIN_PIXELS)
            for name, item in found.items()], f'{split}, labels')
        lists[split] = [name for name in found
                        if os.path.exists(layout.label_path(root, name))]
        layout.run_jobs([
            (archives.copy_member, layout.image_path(root, name), archive,
             members[split][name]) for name in lists[split]],
            f'{split}, images')
    layout.finish(root, 'coco', {}, lists)


def read_annotations(archive, split):
    """Return what polygons.read_objects() does, of the JSON of a split."""
    files = {found: name for _, found, name in archives.zip_members(
        archive, {'json': FILES['annotations']})}
    if split not in files:
        raise utils.UserError(f'{archive} has no instances_{split}2017.json: '
                              f'it is not the official archive')
    data = archives.parse_json(archives.read_member(archive, files[split]),
                               archive)
    return polygons.read_objects(
        data, {ID: i for i, ID in enumerate(IDS) if i}, files[split])
