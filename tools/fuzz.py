"""Fuzzing: spoilt files are given to what reads them.

    python -m tools.fuzz [IMAGES] [--seed N]        under ten minutes

IMAGES mutated images (1,000), and a tenth as many of each other kind: labels,
lists, class files, annotations of COCO, labelme and YOLO, checkpoints,
settings.json with log.csv. Each is accepted or refused by an error of one
line. A fault is anything else: another error, a traceback, a file changed
outside the working folder, 2 GB of memory more than before, five minutes, a
checkpoint with spoilt bytes whose weights are accepted but are not those that
were saved. The whole files are tried too, and have to be accepted.

Prints a table. Exit status 1, with a line for each, where there were faults;
the files that led to them are then in the folder fuzz_faults.
"""
import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import tempfile

import numpy as np
from PIL import Image

import heads
import prepare
import settings
import utils
from converters import layout
from lib import checkpoint
from lib.run import capture
from tools import export
from tools.fuzz_cases import FORMATS, KINDS, SPOILT, run
from tools.measure import markdown_table

SMALL = {'DATA_ROOT': 'set', 'TRAIN_SPLIT': 'train', 'VAL_SPLIT': 'val',
         'N_CLASSES': 6, 'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16,
         'EM_CHANNELS': 32, 'EM_BASES': 8, 'DEVICES': [-1], 'NUM_WORKERS': 0}
MEMORY, SECONDS = 2 << 30, 300      # that a file may take


# ------------------------------------------------- the whole files
def make_files():
    """Make the files that cases spoil, in this folder, and what lies outside.
    """
    prepare.main(['toy', '--to', 'set', '--train', '4', '--val', '1'])
    for folder in ('images', 'many', 'photos', 'log', 'notes/coco',
                   'notes/labelme', 'notes/yolo'):
        os.makedirs(folder)
    image = Image.open('set/JPEGImages/toy_0001.jpg').resize((60, 40))
    for kind, ending in FORMATS.items():
        for mode in ('RGB', 'L', 'P', '1', 'LA', 'RGBA', 'I', 'CMYK'):
            with contextlib.suppress(OSError, ValueError):  # not of the format
                image.convert(mode).save(f'images/{mode}.{ending}', kind)
    image.save('../secret.jpg')
    image.convert('L').point(lambda x: x // 50).save('../secret.png')
    corners, objects = (5, 5, 40, 5, 40, 30), []
    for i, name in enumerate(('p0', 'p1')):
        image.save(f'photos/{name}.jpg')
        objects.append({'image_id': i, 'category_id': 3, 'bbox': [5] * 4,
                        'segmentation': [corners]})
        utils.save_json({'imagePath': f'{name}.jpg', 'imageHeight': 40,
                         'imageWidth': 60, 'shapes': [
                             {'label': 'roof', 'shape_type': 'polygon',
                              'points': np.reshape(corners, (-1, 2)).tolist()},
                             {'label': 'tree', 'shape_type': 'circle',
                              'points': [[20, 20], [20, 30]]}]},
                        f'notes/labelme/{name}.json')
        with open(f'notes/yolo/{name}.txt', 'w') as file:
            file.write('0 .1 .1 .7 .1 .7 .8\n1 0 0 .5 0 .5 1 0 1\n')
    objects[0]['segmentation'] = {'size': [40, 60], 'counts': [99, 900, 1401]}
    utils.save_json({'images': [
        {'id': i, 'file_name': f'p{i}.jpg', 'height': 40, 'width': 60}
        for i in range(2)], 'categories': [{'id': 3, 'name': 'roof'}],
        'annotations': objects}, 'notes/coco/own.json')
    utils.save_json({**settings.as_dict(), 'LOG_DIR': f'{SPOILT}/log'},
                    'log/settings.json')
    with open('log/log.csv', 'w') as file:
        file.write('step,loss,val_mIoU,images_per_s\n1,2.5,,4.0\n'
                   '2,2.25,0.125,4.5\n')
    net = heads.build_network()
    checkpoint.save(capture({'net': net}, 2, 0.125, False), 'net.pth')
    run(export.main, 'net.safetensors', 'net.pth')


# ------------------------------------------------- one case
class TookTooLong(BaseException):
    """Nothing in the project catches this."""


def files_outside():
    """Return {path: bytes} of the files beside the working folder."""
    found = {}
    for folder, folders, files in os.walk('..'):
        folders[:] = {*folders} - {'work'}
        for path in (os.path.join(folder, name) for name in files):
            with open(path, 'rb') as file:
                found[path] = file.read()
    return found


def memory():
    """Return the bytes of memory that this process has, and has had at most.
    """
    with open('/proc/self/statm') as file:
        now = int(file.read().split()[1]) * resource.getpagesize()
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def too_long(number, frame):
    raise TookTooLong(f'more than {SECONDS} s')


def attempt(call):
    """Call; return (how it was refused or '', what is wrong or '')."""
    output, outside, error = io.StringIO(), files_outside(), None
    now, peak = memory()
    try:
        with (contextlib.redirect_stdout(output),
              contextlib.redirect_stderr(output)):
            signal.alarm(SECONDS)
            call()
    except (Exception, SystemExit, TookTooLong) as raised:
        error = raised
    finally:
        signal.alarm(0)
    line = utils.explain(error)[0] if isinstance(error, Exception) else None
    taken = memory()[1] - now if memory()[1] > peak else 0
    wrong = (
        (error and line is None,
         f'{type(error).__name__}: {error and utils.first_line(error)}'),
        ('Traceback' in f'{output.getvalue()}{line}', 'a traceback'),
        (line and not all(each.startswith('  ')     # predict.py's, by file
                          for each in line.split('\n')[1:]),
         f'more than one line: {line!r}'),
        (files_outside() != outside, 'a file outside the folder has changed'),
        (taken > MEMORY or 'too much memory' in (line or ''),
         f'{taken / 1e9:.1f} GB of memory, or more than there is'))
    return line or '', '; '.join(text for is_so, text in wrong if is_so)


def try_case(kind, seed, number, keep):
    """Try a case, the whole file where its number is 0; return (whether it
    was refused, what is wrong or '')."""
    random.seed(f'{seed} {kind} {number}')
    shutil.rmtree('spoilt', ignore_errors=True)
    make, *given, mutate = KINDS[kind]
    ends = []
    for call in make(*given, mutate if number else lambda whole: whole):
        refusal, fault = attempt(call)
        if refusal and not number:
            fault = f'the whole file was refused: {refusal}'
        ends.append((refusal or fault, fault))
        vars(settings).update(SMALL)
        settings._given.clear()
    fault = '; '.join(text for _, text in ends if text)
    if fault:
        shutil.copytree('spoilt', os.path.join(keep, f'{kind} {number}'),
                        dirs_exist_ok=True)
    return any(refused for refused, _ in ends), fault


def fuzz(counts, seed, keep):
    """Try {kind: number of cases}; return ([row of the table], [fault])."""
    rows, all_faults = [], []
    with os.fdopen(os.dup(2), 'w') as terminal, utils.progress(
            total=sum(counts.values()) + len(counts), unit='file',
            file=terminal) as bar:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)    # libtiff's warnings
        faulthandler.enable(terminal)
        for kind, count in counts.items():
            bar.set_description(kind)
            n_refused, faults = 0, []
            for number in range(count + 1):
                is_refused, fault = try_case(kind, seed, number, keep)
                n_refused += bool(is_refused and number)
                faults += [f'{kind} {number}: {fault}'] * bool(fault)
                bar.update()
            rows.append([kind, *map(str, (count, count - n_refused, n_refused,
                                          len(faults)))])
            all_faults += faults
        faulthandler.disable()
        os.dup2(terminal.fileno(), 2)
    return rows, all_faults


def limit_memory():
    """Have allocations fail that would endanger the machine."""
    with open('/proc/self/statm') as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (
        now + 2 * MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main():
    """Spoil as many files as the command line says."""
    parser = utils.make_parser(__doc__)
    parser.add_argument('images', nargs='?', type=int, default=1000,
                        metavar='IMAGES')
    parser.add_argument('--seed', type=int, default=0, metavar='N')
    args = parser.parse_args()
    if args.images < 1:
        raise utils.UserError(f'{args.images}: name a number of images, 1 or '
                              f'more')
    counts = {kind: -(-args.images // (6 if kind in FORMATS else 10))
              for kind in KINDS} | {'predict.py': 1}
    keep = os.path.abspath('fuzz_faults')
    vars(settings).update(SMALL)
    layout.map_in_processes = lambda work, jobs, *_: (
        work(*job) for job in jobs)     # in this process
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f'{folder}/work')
        os.chdir(f'{folder}/work')
        make_files()
        limit_memory()
        rows, faults = fuzz(counts, args.seed, keep)
    print(markdown_table(['kind', 'tried', 'accepted', 'refused', 'faults'],
                         rows))
    print(f'{memory()[1] / 1e9:.2f} GB of memory at most')
    if faults:
        raise utils.RunError('\n  '.join([
            f'{utils.plural(len(faults), "fault")}; the files are in {keep}:',
            *faults]))


if __name__ == '__main__':
    utils.run_main(main)
