"""PASCAL Context: the images of VOC 2010, 59 classes and background."""
import re

import utils
from converters import archives, layout, polygons
from lib import images

SOURCE = {
    'archives': (
        ('http://host.robots.ox.ac.uk/pascal/VOC/voc2010/'
         'VOCtrainval_03-May-2010.tar',
         'sha1:bf9985e9f2b064752bf6bd654d89f017c76c395a', 1_360_000_000),
        ('https://codalabuser.blob.core.windows.net/public/'
         'trainval_merged.json',
         'sha1:169325d9f7e9047537fedca7b04de4dddf10b881', 600_000_000)),
    'unpacked': 1_100_000_000,
    'counts': {'train': 4998, 'val': 5105}}
FILES = {'image': r'VOCdevkit/VOC2010/JPEGImages/([0-9]{4}_[0-9]{6})\.jpg'}
# the category ids that become class 0, 1, 2, ...
IDS = (0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72,
       80, 85, 98, 104, 105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220,
       232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355,
       360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458)


def convert(args):
    """Convert PASCAL Context, 59 classes and background: train, val.

    What is none of the 59, or not labelled, is background.
    """
    utils.import_optional('pycocotools.mask')
    root = args.to
    if layout.is_ready(root, 'context', {}):
        return
    archive, notes = archives.fetch(SOURCE, args.source, root)
    lists, found = read_annotations(notes)
    archives.check_counts(SOURCE, lists)
    classes = images.read_class_file(images.class_file('context'))
    layout.begin(root, 'context', {}, classes)
    layout.run_jobs([
        (polygons.write_label, layout.label_path(root, file[:-4]), *item,
         classes[1]) for file, item in found.items()
        if re.fullmatch(r'[0-9]{4}_[0-9]{6}\.jpg', file)], 'labels')
    wanted = {*lists['train'], *lists['val']}
    layout.run_jobs((
        (layout.write_bytes, layout.image_path(root, name), data)
        for _, name, data in archives.tar_members(archive, FILES)
        if name in wanted), 'images')
    layout.finish(root, 'context', {}, lists)


def read_annotations(path):
    """Return ({split: IDs}, what polygons.read_objects() returns) of the JSON
    of Context, whose keys are not COCO's."""
    with open(path, 'rb') as file:
        data = archives.parse_json(file.read(), path)
    archives.check_json(data, ('images', 'annos_segmentation'), path,
                        'the JSON of Context')
    lists = {'train': [], 'val': []}
    try:
        for image in data['images']:
            image['id'] = image['image_id']
            lists[image['phase']].append(image['file_name'][:-4])
        for note in data['annos_segmentation']:
            note['segmentation'] = (note.get('segmentation')
                                    or note.get('RLE'))
        data['annotations'] = data['annos_segmentation']
    except (KeyError, TypeError) as error:
        raise utils.UserError(f'{path} is not the JSON of Context: {error} is '
                              f'not there') from None
    for names in lists.values():
        images.check_ids(names, path)
    return lists, polygons.read_objects(
        data, {ID: i for i, ID in enumerate(IDS) if i}, path)
