"""ADE20K, the scene parsing benchmark: 150 classes."""
import re

import utils
from converters import archives, layout
from lib import images

SOURCE = {
    'archives': (
        ('http://data.csail.mit.edu/places/ADEchallenge/'
         'ADEChallengeData2016.zip',
         'sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7', 967_000_000),),
    'unpacked': 1_100_000_000,
    'counts': {'train': 20_210, 'val': 2000}}
FILES = {
    'image': r'ADEChallengeData2016/images/(?:training|validation)/'
             r'(ADE_(train|val)_[0-9]{8})\.jpg',
    'label': r'ADEChallengeData2016/annotations/(?:training|validation)/'
             r'(ADE_(train|val)_[0-9]{8})\.png'}
NAMES = {'names': r'ADEChallengeData2016/objectInfo150\.txt'}
# a row of that: the id, columns of numbers, "building, edifice"
ROW = re.compile(r'^[ \t]*([0-9]{1,4})(?:[ \t]+[0-9.]+)+[ \t]+([^0-9\s].*)$',
                 re.MULTILINE)
# the ids that become class 0, 1, 2, ...; 0 is what none of them is
IDS = range(1, 151)


def convert(args):
    """Convert ADE20K's scene parsing benchmark, 150 classes: train, val.

    What is none of the 150, or not labelled, is void. A class has the first
    of its names in objectInfo150.txt.
    """
    root, lists = args.to, {'train': [], 'val': []}
    if layout.is_ready(root, 'ade20k', {}):
        return
    archive, = archives.fetch(SOURCE, args.source, root)
    found = archives.zip_members(archive, FILES)
    for kind, ID, split, _ in found:
        if kind == 'label':
            lists[split].append(ID)
    archives.check_counts(SOURCE, lists)
    _, colours = images.read_class_file(images.class_file('ade20k'))
    layout.begin(root, 'ade20k', {}, (read_names(archive), colours))
    layout.run_jobs([
        (archives.copy_member, layout.image_path(root, ID), archive, name)
        if kind == 'image' else
        (archives.write_label, layout.label_path(root, ID), archive, name,
         IDS, colours) for kind, ID, _, name in found], 'convert')
    layout.finish(root, 'ade20k', {}, lists)


def read_names(archive):
    """Return the 150 class names: of each class the first of its synonyms
    that no class before it has. Raises UserError."""
    member = [name for _, name in archives.zip_members(archive, NAMES)]
    if not member:
        raise utils.UserError(f'{archive} has no objectInfo150.txt: it is not '
                              f'the official archive')
    path, names = f'{archive}: {member[0]}', []
    text = utils.decode_text(archives.read_member(archive, member[0]), path)
    rows = ROW.findall(text)
    for _, synonyms in rows:
        names += [name for name in map(str.strip, synonyms.split(','))
                  if images.is_class_name(name) and name not in names][:1]
    if [int(ID) for ID, _ in rows] != [*IDS] or len(names) != len(IDS):
        raise utils.UserError(f'{path} has {utils.plural(len(rows), "row")} '
                              f'and {len(names)} class names, not one each '
                              f'for 1 to {len(IDS)}: it is not the official '
                              f'file')
    return names
