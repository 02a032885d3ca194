"""The cases of tools.fuzz: what spoils files, and what reads them then.

All is in the working folder. Changes are drawn from `random`, which the caller
seeds.
"""
import copy
import functools
import glob
import json
import os
import random
import shutil
import sys
import zlib

import torch

import eval
import heads
import predict
import prepare
import settings
from converters import custom
from dataset import LABELS, LISTS, Segmentation
from lib import checkpoint, images
from tools import clean, compare_runs, submit

FORMATS = {'JPEG': 'jpg', 'PNG': 'png', 'TIFF': 'tif', 'BMP': 'bmp',
           'GIF': 'gif', 'WEBP': 'webp'}
SPOILT = 'spoilt/a/set'             # a case's files; SECRET leads from there,
SECRET = '../../../../../secret'    # and from a mask's folder, to the outside
VALUES = [None, True, 0, 1, -1, 7, 2 ** 31, 10 ** 30, 0.5, 1e308,
          float('nan'), float('inf'), '', '..', 'x', 'ü\0\n', SECRET,
          '/etc/passwd', [], {}, [[]], [-1], [None] * 3, {'x': [1e9] * 9}]
WORDS = [*4 * [SECRET], '/etc/passwd', '..\\..\\x', '\0', 'ü', '\n', ' ', '{',
         '-1', '1e999', 'nan', '9' * 40, '0', '"', ',', '\ufeff', '\u2028']
build_network = functools.cache(heads.build_network)


# ------------------------------------------------- mutations
def mutate_bytes(data):
    """Return bytes with one to four changes, every other time near the head.
    """
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        i = int(len(data) * random.random() ** random.choice((1, 4)))
        end = i + random.choice((1, 1, 2, 4, random.randint(1, 4096)))
        data[i:end] = random.choice((
            lambda part: bytes(x ^ 1 << random.randrange(8) for x in part),
            lambda part: random.randbytes(len(part)),
            lambda part: bytes(len(part)),
            lambda part: b'\xff' * len(part),
            lambda part: b'',
            lambda part: part + part,
            lambda part: random.choice(WORDS).encode()))(data[i:end])
        if random.random() < 0.05:
            del data[i:]
    return bytes(data)


def mutate_image(data):
    """Return the bytes of an image with changes; of PNG with checksums that
    are right, every other time, so that what they guard is read."""
    data = bytearray(data if random.random() < 0.2 else mutate_bytes(data))
    is_mended = data[:4] == b'\x89PNG' and random.random() < 0.5
    if is_mended and random.random() < 0.2:             # width, height
        data[16:24] = b''.join(random.choice(
            (0, 1, 60, 13000, 16384, 2 ** 31 - 1)).to_bytes(4) for _ in 'wh')
    place = 8 if is_mended else len(data)
    while place + 12 <= len(data):          # size, name, content, checksum
        end = place + 8 + int.from_bytes(data[place:place + 4])
        data[end:end + 4] = zlib.crc32(data[place + 4:end]).to_bytes(4)
        place = end + 4
    return bytes(data)


def mutate_text(data):
    """Return the bytes of a text with words or lines changed."""
    if random.random() < 0.1:
        return mutate_bytes(data)
    space = random.choice('\n ')
    words = data.decode().split(space)
    for _ in range(random.randint(1, 3)):
        i = random.randrange(len(words) + 1)
        words[i:i + random.randint(0, 3)] = random.choice((
            [], [random.choice(WORDS)], 2 * words[i:i + 6],
            [random.choice(words or [''])], [random.choice(WORDS)]))
    return space.join(words).encode(
        random.choice(('utf-8', 'utf-8', 'utf-16', 'latin-1')), 'replace')


def mutate_value(value):
    """Change a random part of nested lists and dicts, in place."""
    while isinstance(value, (dict, list)) and value:
        key = random.choice([*value] if isinstance(value, dict) else
                            range(len(value)))
        part = value[key]
        if not isinstance(part, (dict, list)) or not part or (
                random.random() < 0.2):
            break
        value = part
    else:
        return
    if random.random() < 0.2:
        del value[key]
    else:
        value[key] = copy.deepcopy(random.choice(VALUES))


def mutate_json(data):
    """Return the bytes of a JSON file with one to three changes."""
    if random.random() < 0.3:
        return mutate_text(data)
    value = json.loads(data)
    for _ in range(random.randint(1, 3)):
        mutate_value(value)
    return json.dumps(value).encode()


# ------------------------------------------------- cases
def spoil(path, mutate, to=None):
    """Copy a file's mutation into SPOILT; return its path."""
    to = os.path.join(SPOILT, to or path)
    os.makedirs(os.path.dirname(to), exist_ok=True)
    with open(path, 'rb') as file, open(to, 'wb') as spoilt:
        spoilt.write(mutate(file.read()))
    return to


def run(main, *words):
    """Run a script's main, as its command line says."""
    sys.argv = ['fuzz', *words]
    main()


def convert(*words):
    """Run `prepare.py custom` on its arguments."""
    shutil.rmtree('made', ignore_errors=True)
    prepare.main(['custom', *words, '--to', 'made'])


def choose(path, ending, mutate):
    """Return the path of an image of any mode, path for a whole one."""
    return path if mutate is not mutate_image else random.choice(
        [path, *sorted(glob.glob(f'images/*.{ending}'))])


def spoil_image(kind, mutate):
    """Yield calls that read an image of a format."""
    path = f'images/RGB.{FORMATS[kind]}'
    path = spoil(choose(path, FORMATS[kind], mutate), mutate)
    yield lambda: images.read_image(path)
    yield lambda: images.image_size(path)
    yield lambda: images.upright_size(path)
    yield lambda: custom.convert_image('made.jpg', path, (40, 60))

    def read_any():         # what predict.py reads, and it gets it at the end
        side = max(images.read_any_image(path).shape)
        assert 0 < side < 2 ** 28
        if side < 1000:
            shutil.copy(path, f'many/{len(os.listdir("many"))}'
                        f'.{FORMATS[kind]}')
    yield read_any


def spoil_set(name, mutate):
    """Yield calls that read a data set in which a file is spoilt."""
    shutil.copytree('set', SPOILT)
    spoil(choose(f'set/{name}', 'png', mutate), mutate, name)
    folders = f'{SPOILT}/JPEGImages', f'{SPOILT}/{LABELS}'
    calls = [lambda: Segmentation('train', True).scan_labels(),
             lambda: Segmentation('train', True)[0],
             lambda: images.read_classes(SPOILT, settings.N_CLASSES),
             lambda: convert(*folders, '--classes', f'{SPOILT}/classes.txt')]
    if mutate is not mutate_image:              # what reads no labels
        calls.append(lambda: submit.submit(
            build_network().eval(), Segmentation('train', False, False),
            submit.VOC))
    for call in calls:
        settings.DATA_ROOT, settings.VAL_SPLIT = SPOILT, 'train'
        yield call


def spoil_notes(path, mutate):
    """Yield a call that converts annotations, of which a file is spoilt."""
    folder = os.path.dirname(path)
    shutil.copytree(folder, f'{SPOILT}/{folder}')
    spoil(path, mutate)
    where = path if 'coco' in path else folder
    yield lambda: convert('photos', os.path.join(SPOILT, where))


def spoil_weights(path, mutate):
    """Yield calls that load a checkpoint whose bytes are spoilt."""
    spoilt = spoil(path, mutate)

    def load():
        found = checkpoint.read_checkpoint(spoilt)
        right = checkpoint.read_checkpoint(path)
        assert found.keys() == right.keys() and all(
            torch.equal(value, right['net'][key])
            for key, value in found.pop('net').items()), 'other weights'
        assert found == {key: right[key] for key in found}, 'other entries'
    yield load
    yield lambda: run(eval.main, spoilt)


def spoil_record(mutate):
    """Yield calls that use a checkpoint whose entries are spoilt."""
    state = torch.load('net.pth')
    state['net'] = {**state['net']}
    record = {name: json.loads(json.dumps(state[name])) for name in state
              if name != 'net'}
    for _ in range(random.randint(1, 3)):
        mutate(random.choice([record, state['net'], *[
            record.get('settings', record)] * 3]))
    os.makedirs(SPOILT)
    torch.save({**record, 'net': state['net']}, f'{SPOILT}/a.pth')
    yield lambda: run(eval.main, f'{SPOILT}/a.pth')
    yield lambda: run(predict.main, 'images/RGB.jpg', f'{SPOILT}/a.pth')


def spoil_log(name, mutate):
    """Yield calls that read a folder of logs in which a file is spoilt."""
    shutil.copytree('log', f'{SPOILT}/log')
    spoil(f'log/{name}', mutate)
    yield lambda: run(compare_runs.main, SPOILT)
    yield lambda: run(clean.main, f'LOG_DIR={SPOILT}/log')


def spoil_images(mutate):
    """Yield a call that segments the images that were accepted before, and
    some that may not be."""
    for i in range(20):
        spoil('images/RGB.png', mutate, f'new_{i}.png')
    yield lambda: run(predict.main, 'many', SPOILT, 'net.pth')


# kind: (what yields the calls of a case, its arguments, the last the mutation)
KINDS = {**{kind: (spoil_image, kind, mutate_image) for kind in FORMATS},
         'label': (spoil_set, f'{LABELS}/toy_0001.png', mutate_image),
         'list': (spoil_set, f'{LISTS}/train.txt', mutate_text),
         'classes.txt': (spoil_set, 'classes.txt', mutate_text),
         'COCO': (spoil_notes, 'notes/coco/own.json', mutate_json),
         'labelme': (spoil_notes, 'notes/labelme/p0.json', mutate_json),
         'YOLO': (spoil_notes, 'notes/yolo/p0.txt', mutate_text),
         'pth': (spoil_weights, 'net.pth', mutate_bytes),
         'safetensors': (spoil_weights, 'net.safetensors', mutate_bytes),
         'entries of a pth': (spoil_record, mutate_value),
         'settings.json': (spoil_log, 'settings.json', mutate_json),
         'log.csv': (spoil_log, 'log.csv', mutate_text),
         'predict.py': (spoil_images, mutate_image)}
