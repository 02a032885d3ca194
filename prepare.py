"""Convert a data set into the one layout that dataset.py reads.

    python prepare.py toy [--to DIR] [--seed N] [--train N] [--val N]
    python prepare.py voc [--from DIR] [--to DIR] [--sbd-first]
    python prepare.py coco | cityscapes | context | cocostuff | ade20k
                      [--from DIR] [--to DIR]
    python prepare.py custom IMAGES MASKS [--to DIR] [--classes FILE] ...

This writes DIR, data/NAME by default: JPEGImages/ID.jpg,
SegmentationClassAug/ID.png (class numbers, 255 is void),
ImageSets/Segmentation/SPLIT.txt, classes.txt. Archives are downloaded into the
folder `downloads` beside DIR, or taken from --from DIR, and read as they are,
in several processes. A conversion that was cut off is resumed when it is run
again; a finished one is left as it is, but custom converts what has changed.
docs/data.md says more.
"""
if __name__ == '__main__':      # before torch, whose import takes seconds
    from lib import signals
    signals.end_while_starting()

import argparse
import sys
import textwrap

import utils
from converters import (
    ade20k,
    cityscapes,
    coco,
    cocostuff,
    context,
    custom,
    toy,
    voc,
)

CONVERTERS = {'toy': toy, 'voc': voc, 'coco': coco, 'cityscapes': cityscapes,
              'context': context, 'cocostuff': cocostuff, 'ade20k': ade20k,
              'custom': custom}


def make_parser():
    """Return the parser, a subcommand for each converter."""
    parser = utils.make_parser(__doc__)
    names = parser.add_subparsers(metavar='NAME', required=True,
                                  prog='python prepare.py')
    commands = {}
    for name, converter in CONVERTERS.items():
        about = textwrap.dedent('    ' + converter.convert.__doc__)
        command = names.add_parser(
            name, help=about.split('\n')[0], description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(convert=converter.convert)
        command.add_argument('--to', metavar='DIR', default=f'data/{name}',
                             help='the folder to make (default: %(default)s)')
        if hasattr(converter, 'SOURCE'):
            command.add_argument(
                '--from', metavar='DIR', dest='source',
                help='the folder of the archives (default: downloads, beside '
                     'the folder to make; what is not there is downloaded)')
        commands[name] = command
    for key, default in (('seed', 0), ('train', 200), ('val', 40)):
        commands['toy'].add_argument(f'--{key}', metavar='N', type=int,
                                     default=default,
                                     help='default: %(default)s')
    commands['voc'].add_argument(
        '--sbd-first', action='store_true',
        help='training images that SBD labels get its mask, not '
             "VOC's: the variant of many papers; val keeps VOC's")
    add_custom_options(commands['custom'].add_argument)
    return parser


def add_custom_options(add):
    """Add the options of `custom` by its add_argument."""
    add('images', metavar='IMAGES',
        help='a folder of images; those in folders inside it, too')
    add('masks', metavar='MASKS',
        help="a folder of masks, perhaps the same; COCO's JSON; a folder of "
             "labelme's JSON or of YOLO's polygons")
    add('--classes', metavar='FILE',
        help='a line a class, "name r g b", in the order of their numbers, '
             "or CVAT's labelmap.txt")
    add('--by-colour', action='store_true',
        help='palette and grey masks, too, by the colours of --classes')
    add('--white', choices=('object', 'void'),
        help='what the other value is in masks of 0 and one other value, '
             'such as 255')
    add('--suffix', default='',
        help='of masks: with _xy, a.jpg has a_xy.png; common ones, such as '
             '_mask, are tried')
    add('--val', metavar='SHARE', type=float, default=0.2,
        help='the share of val (default: %(default)s)')
    add('--seed', metavar='N', type=int, default=0,
        help='of the split (default: %(default)s)')


def main(argv=None):
    """Convert the data set that the command line names."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['masks']:
        raise utils.UserError('masks is now named custom: python prepare.py '
                              'custom IMAGES MASKS [--to DIR] ...')
    args = make_parser().parse_args(argv)
    if not args.to:
        raise utils.UserError("--to '': name the folder to make")
    args.convert(args)


if __name__ == '__main__':
    utils.run_main(main)
