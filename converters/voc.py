"""PASCAL VOC 2012 with the labels of SBD: the 10,582 images of trainaug."""
import utils
from converters import archives, layout
from lib import images

SOURCE = {
    'archives': (
        (('http://host.robots.ox.ac.uk/pascal/VOC/voc2012/'
          'VOCtrainval_11-May-2012.tar'),
         'md5:6cd6e144f989b92b3379bac3b3de84fd', 1_999_639_040),
        (('https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/'
          'grouping/semantic_contours/benchmark.tgz'),
         'md5:82b4d87ceb2ed10f6038a1cba92111cb', 1_420_000_000)),
    'unpacked': 1_300_000_000,
    'lists': {'train': (1464, 'aa623bd2c8ce4443a8aaae51c524c0eb'),
              'val': (1449, 'cdc1326d12f69ce5153aa5da04a4d878'),
              'trainval': (2913, 'f8dae64f9e08d8b06ef41286dcd4c516'),
              'trainaug': (10582, 'd1326bd532648d73bc4b1bd275434eba')}}
VOC_FILES = {
    'list': r'VOCdevkit/VOC2012/ImageSets/Segmentation/'
            r'(train|val|trainval)\.txt',
    'image': r'VOCdevkit/VOC2012/JPEGImages/([0-9]{4}_[0-9]{6})\.jpg',
    'label': r'VOCdevkit/VOC2012/SegmentationClass/([0-9]{4}_[0-9]{6})\.png'}
SBD_FILES = {
    'list': r'benchmark_RELEASE/dataset/(train|val)\.txt',
    'label': r'benchmark_RELEASE/dataset/cls/([0-9]{4}_[0-9]{6})\.mat'}


def convert(args):
    """Convert VOC 2012 and SBD: train, val, trainval, trainaug.

    A mask is VOC's own where VOC has one, else SBD's, which has no void
    border; with --sbd-first SBD's goes first, but for val. Differs: the
    widely used SegmentationClassAug has SBD's for some that VOC has too.
    """
    utils.import_optional('scipy.io')
    root, options = args.to, {'sbd_first': args.sbd_first}
    if layout.is_ready(root, 'voc', options):
        return
    voc_tar, sbd_tgz = archives.fetch(SOURCE, args.source, root)
    classes = images.read_class_file(images.class_file('voc'))
    layout.begin(root, 'voc', options, classes)
    lists = {split: set() for split in SOURCE['lists']}
    for _, split, data in archives.tar_members(
            voc_tar, {'list': VOC_FILES['list']}):
        lists[split].update(archives.parse_ids(
            data, f'{voc_tar}: {split}.txt'))
    own = lists['val' if args.sbd_first else 'trainval']
    layout.run_jobs(sbd_jobs(sbd_tgz, root, own, lists['trainaug'],
                             classes[1]), 'SBD')
    lists['trainaug'] |= lists['train']
    lists['trainaug'] -= lists['val']
    archives.check_lists(SOURCE, lists)
    layout.run_jobs(voc_jobs(voc_tar, root, lists), 'VOC')
    layout.finish(root, 'voc', options, lists)


def sbd_jobs(archive, root, own, listed, colours):
    """Yield the jobs of SBD's labels, and add its lists to the set `listed`.

    own: the IDs that have VOC's mask instead.
    """
    for kind, name, data in archives.tar_members(archive, SBD_FILES):
        if kind == 'list':
            listed.update(archives.parse_ids(data, f'{archive}: {name}.txt'))
        elif name not in own:
            yield write_label, layout.label_path(root, name), data, colours


def write_label(path, data, colours):
    """Write SBD's mask, a .mat file's bytes, as a palette PNG."""
    try:
        mask = archives.parse_mat(data, 'GTcls')['Segmentation'][0, 0]
    except (ValueError, IndexError):
        raise utils.UserError('GTcls of the .mat file has no Segmentation'
                              ) from None
    images.save_label(mask, path, colours)


def voc_jobs(archive, root, lists):
    """Yield the jobs of the lists' images, and of VOC's masks (run_jobs skips
    those that SBD has given)."""
    wanted = lists['trainaug'] | lists['val']       # all of train, trainval
    for kind, name, data in archives.tar_members(archive, VOC_FILES):
        if kind == 'image' and name in wanted:
            yield layout.write_bytes, layout.image_path(root, name), data
        if kind == 'label' and name in lists['trainval']:
            yield layout.write_bytes, layout.label_path(root, name), data
