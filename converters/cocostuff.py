"""COCO-Stuff 10k v1.1, 171 classes."""
import utils
from converters import archives, layout
from lib import images

SOURCE = {
    'archives': (
        ('http://calvin.inf.ed.ac.uk/wp-content/uploads/data/'
         'cocostuffdataset/cocostuff-10k-v1.1.zip', '', 2_100_000_000),),
    'unpacked': 1_900_000_000,
    'counts': {'train': 9000, 'test': 1000}}
FILES = {
    'list': r'(?:[\w.-]+/)?imageLists/(train|test)\.txt',
    'image': r'(?:[\w.-]+/)?images/(COCO_train2014_[0-9]{12})\.jpg',
    'label': r'(?:[\w.-]+/)?annotations/(COCO_train2014_[0-9]{12})\.mat'}
# the ids that become class 0, 1, 2, ...
IDS = tuple(sorted({*range(1, 183)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83,
                                       91}))


def convert(args):
    """Convert COCO-Stuff 10k v1.1, 171 classes: train, test.

    Unlabelled pixels are void.
    """
    utils.import_optional('scipy.io')
    root = args.to
    if layout.is_ready(root, 'cocostuff', {}):
        return
    archive, = archives.fetch(SOURCE, args.source, root)
    found = archives.zip_members(archive, FILES)
    lists = {'train': [], 'test': []}
    for kind, split, name in found:
        if kind == 'list':
            lists[split] = archives.parse_ids(
                archives.read_member(archive, name), f'{archive}: {name}')
    archives.check_counts(SOURCE, lists)
    classes = images.read_class_file(images.class_file('cocostuff'))
    layout.begin(root, 'cocostuff', {}, classes)
    wanted = {*lists['train'], *lists['test']}
    layout.run_jobs([
        (archives.copy_member, layout.image_path(root, ID), archive, name)
        if kind == 'image' else
        (write_label, layout.label_path(root, ID), archive, name, classes[1])
        for kind, ID, name in found if ID in wanted], 'convert')
    layout.finish(root, 'cocostuff', {}, lists)


def write_label(path, archive, name, colours):
    """Write COCO-Stuff's mask, the field S of a .mat file."""
    try:
        mask = archives.parse_mat(archives.read_member(archive, name), 'S')
    except utils.UserError as error:
        raise utils.UserError(f'{archive}: {name}: {error}') from None
    images.save_label(layout.remap_ids(mask, IDS), path, colours)
