"""Cityscapes, fine annotations, 19 classes. Its download needs a login."""
from converters import archives, layout
from lib import images

SOURCE = {
    'login': 'https://www.cityscapes-dataset.com/downloads/',
    'archives': (('leftImg8bit_trainvaltest.zip', '', 11_600_000_000),
                 ('gtFine_trainvaltest.zip', '', 253_000_000)),
    'unpacked': 4_000_000_000,
    'counts': {'train': 2975, 'val': 500, 'test': 1525}}
IMAGES = {'image': r'leftImg8bit/(?:train|val|test)/[a-z-]+/'
                   r'([a-z-]+_[0-9]{6}_[0-9]{6})_leftImg8bit\.png'}
LABELS = {'label': r'gtFine/(train|val|test)/[a-z-]+/'
                   r'([a-z-]+_[0-9]{6}_[0-9]{6})_gtFine_labelIds\.png'}
# the ids that become class 0, 1, 2, ...
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32,
       33)


def convert(args):
    """Convert Cityscapes, 19 classes: train, val, test.

    The images, PNGs, become JPEGs of quality 95 with full chroma. The labels
    of test are void, as the test server keeps them.
    """
    root, lists = args.to, {'train': [], 'val': [], 'test': []}
    if layout.is_ready(root, 'cityscapes', {}):
        return
    image_zip, label_zip = archives.fetch(SOURCE, args.source, root)
    labels = archives.zip_members(label_zip, LABELS)
    for _, split, ID, _ in labels:
        lists[split].append(ID)
    archives.check_counts(SOURCE, lists)
    classes = images.read_class_file(images.class_file('cityscapes'))
    layout.begin(root, 'cityscapes', {}, classes)
    layout.run_jobs([
        (write_image, layout.image_path(root, ID), image_zip, name)
        for _, ID, name in archives.zip_members(image_zip, IMAGES)] + [
        (archives.write_label, layout.label_path(root, ID), label_zip, name,
         IDS, classes[1]) for _, _, ID, name in labels], 'convert')
    layout.finish(root, 'cityscapes', {}, lists)


def write_image(path, archive, name):
    """Write an image of Cityscapes as a JPEG."""
    layout.save_jpeg(archives.open_image(archive, name), path)
