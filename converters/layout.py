"""The one layout of a prepared data set, and the work of filling it.

    ROOT/JPEGImages/ID.jpg
    ROOT/SegmentationClassAug/ID.png            class index, 255 = void
    ROOT/ImageSets/Segmentation/SPLIT.txt       an ID a line, sorted
    ROOT/classes.txt                            a line a class: name r g b
    ROOT/prepared.json                          name, options; counts when done

A converter calls is_ready(), begin(), run_jobs() and finish(), in that order;
a conversion that was cut off is resumed when it is run again.
"""
import collections
import concurrent.futures
import contextlib
import json
import os
import signal

import numpy as np

import utils
from lib import images

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
LISTS = os.path.join('ImageSets', 'Segmentation')
VOID = 255
FORMER_NAMES = {'masks': 'custom'}      # in prepared.json of older sets


def image_path(root, name):
    """Return the path of an image in the layout."""
    return os.path.join(root, 'JPEGImages', name + '.jpg')


def label_path(root, name):
    """Return the path of a label in the layout."""
    return os.path.join(root, 'SegmentationClassAug', name + '.png')


# ------------------------------------------------- begin and finish
def is_ready(root, name, options, sources=None):
    """Tell whether root already holds this data set, complete, and made of
    these sources, as finish() was given them.

    Raises UserError when it holds anything else.
    """
    stamp = read_stamp(root, name, options)
    if 'counts' not in stamp or stamp.get('sources') != sources or missing(
            root, stamp['counts']):
        return False
    utils.log(f'{root} is ready: {name}, {describe_counts(stamp["counts"])}; '
              f'remove it to convert it again')
    return True


def read_stamp(root, name, options):
    """Return what prepared.json holds, {} where there is no root yet.

    Raises UserError when root holds anything else than this data set.
    """
    path = os.path.join(root, 'prepared.json')
    if not os.path.exists(path):
        if os.path.isfile(root) or (os.path.isdir(root) and
                                    os.listdir(root)):
            raise utils.UserError(f'{root} holds files that prepare.py did '
                                  f'not make; name another folder with --to')
        return {}
    try:
        stamp = json.loads(utils.read_text(path))
        held = FORMER_NAMES.get(stamp['name'], stamp['name'])
        before = {key: stamp['options'].get(key) for key in options}
        check_stamp(stamp)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise utils.UserError(f'{path} cannot be read; name another folder '
                              f'with --to, or remove this one') from None
    if (held, before) != (name, options):
        changes = ', '.join(f'{key}: {before[key]!r} -> {options[key]!r}'
                            for key in options if before[key] != options[key])
        raise utils.UserError(
            f'{root} holds {held}, ' + (
                f'made with other options ({changes})' if held == name else
                f'not {name}') + '; name another folder with --to, or remove '
            'this one')
    return stamp


def check_stamp(stamp):
    """Raise ValueError, or what Python does, unless counts are numbers and
    names are those of images within their folder."""
    counts, names = stamp.get('counts', {}), []
    if 'sources' in stamp:
        names = [*stamp['sources']['images'], *stamp['sources']['labels']]
    if sum(counts.values()) < 0 or not all(map(images.is_id,
                                               [*counts, *names])):
        raise ValueError


def begin(root, name, options, classes, sources=None):
    """Make the folders of the layout, the class file and prepared.json.

    classes: names and colours, [str], [[r, g, b]]; sources: a record of what
    the set is made of, for is_ready().
    """
    try:
        for folder in ('JPEGImages', 'SegmentationClassAug', LISTS):
            os.makedirs(os.path.join(root, folder), exist_ok=True)
    except OSError as error:
        raise utils.RunError(f'{root} cannot be made ({error}); name another '
                             f'folder with --to') from None
    write_lines(os.path.join(root, 'classes.txt'), [
        f'{c} {r} {g} {b}' for c, (r, g, b) in zip(*classes, strict=True)])
    _write_stamp(root, name=name, options=options, sources=sources)


def finish(root, name, options, lists, sources=None):
    """Write the lists {split: IDs}, and their counts into prepared.json;
    sources: as begin() has it.

    Raises RunError when an image or a label of theirs is missing.
    """
    for split, names in lists.items():
        write_lines(os.path.join(root, LISTS, split + '.txt'), sorted(names))
    counts = {split: len(names) for split, names in lists.items()}
    lost = missing(root, counts)
    if lost:
        n_lost = utils.plural(len(lost), 'file')
        raise utils.RunError(f'{n_lost} of the lists could not be made, such '
                             f'as {lost[0]}')
    os.sync()               # files were not made to wait for the disk
    _write_stamp(root, name=name, options=options, sources=sources,
                 counts=counts)
    utils.log(f'{root} is ready: {name}, {describe_counts(counts)}')


def describe_counts(counts):
    """Return "train 1,464, val 1,449" of {split: number of images}."""
    return ', '.join(f'{split} {n:,}' for split, n in counts.items())


def _write_stamp(root, **stamp):
    utils.save_json({key: value for key, value in stamp.items()
                     if value is not None},
                    os.path.join(root, 'prepared.json'))


def missing(root, splits):
    """Return the paths of lists, and of what they name, that are not there,
    or empty, as a power cut leaves them."""
    lists = [os.path.join(root, LISTS, split + '.txt') for split in splits]
    lost, names = [path for path in lists if not os.path.exists(path)], set()
    for path in filter(os.path.exists, lists):
        names.update(images.read_ids(path))
    return sorted(lost + [where(root, name) for name in names
                          for where in (image_path, label_path)
                          if not file_bytes(where(root, name))])


# ------------------------------------------------- IDs
def name_image(file, folder):
    """Return the ID of an image at the path `file` within a folder, a_b for
    a/b.jpg; raise UserError for a name that a list cannot hold."""
    name = os.path.splitext(file)[0].replace('/', '_').strip()
    if not images.is_id(name):
        raise utils.UserError(f'{folder}: the file name {ascii(file)} cannot '
                              f'stand in a list; rename it')
    return name


# ------------------------------------------------- files
def file_bytes(path):
    """Return the size of a file, or of a folder's files; 0 for neither."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path))
    return os.path.getsize(path) if os.path.exists(path) else 0


def list_files(folder, endings):
    """Return the paths within a folder, at any depth, of files with one of
    these endings, sorted; hidden ones, and prepared sets, are left out."""
    found = []
    for place, folders, files in os.walk(folder):
        if place != folder and 'prepared.json' in files:
            folders.clear()
            continue
        folders[:] = [each for each in folders if each[0] != '.']
        found += [os.path.relpath(os.path.join(place, file), folder)
                  for file in files if file[0] != '.'
                  and os.path.splitext(file)[1].lower() in endings]
    return sorted(path.replace(os.sep, '/') for path in found)


def write_bytes(path, data):
    """Write a file, whole or not at all."""
    with utils.atomic_write(path, flush=False) as part, \
            open(part, 'wb') as file:
        file.write(data)


def write_lines(path, lines):
    """Write a text file, whole or not at all."""
    with utils.atomic_write(path) as part, open(
            part, 'w', encoding='utf-8') as file:
        file.writelines(f'{line}\n' for line in lines)


def save_jpeg(image, path):
    """Write a Pillow image, whole or not at all, as a JPEG of quality 95 with
    chroma at full resolution."""
    with utils.atomic_write(path, flush=False) as part:
        image.convert('RGB').save(part, 'JPEG', quality=95, subsampling=0)


def remap_ids(mask, ids):
    """Return a mask (H, W) of ids as classes: ids[i] is i, others void."""
    table = np.full(257, VOID, np.uint8)
    table[list(ids)] = range(len(ids))
    return table[np.minimum(mask, np.int32(256))]


# ------------------------------------------------- several processes
def map_in_processes(work, jobs, desc, total=None, is_done=None):
    """Yield work(*job) of each job, in order, from several processes.

    Args:
        work: a function of a module, which the processes import.
        jobs: tuples of arguments; a generator is read only so far ahead.
        desc, total: text and length of the progress bar.
        is_done: jobs of which is_done(job) is true are skipped.
    """
    batch_size = min(16, (total or 0) // 100 + 1)
    pending, batch = collections.deque(), []
    pool = concurrent.futures.ProcessPoolExecutor(
        min(8, os.cpu_count() or 1), initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        with _delayed_interrupt():
            pool.submit(int)            # starts the processes
        for job in utils.progress(jobs, desc=desc, total=total):
            if not (is_done and is_done(job)):
                batch.append(job)
            if len(batch) == batch_size:
                pending.append(pool.submit(_run_batch, work, batch))
                batch = []
            if len(pending) * batch_size > 64:      # what is read ahead
                yield from pending.popleft().result()
        pending.append(pool.submit(_run_batch, work, batch))
        for future in pending:
            yield from future.result()
    except concurrent.futures.BrokenExecutor:
        raise utils.RunError(f'{desc}: a process was killed. Was memory '
                             f'short? Run the command again, and it is '
                             f'resumed') from None
    finally:
        pool.shutdown(cancel_futures=True)      # as after Ctrl-C


@contextlib.contextmanager
def _delayed_interrupt():
    """Within, Ctrl-C waits: a process that is just started would be lost."""
    found = []
    before = signal.signal(signal.SIGINT, lambda *args: found.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if found:
        raise KeyboardInterrupt


def _run_batch(work, jobs):
    return [work(*job) for job in jobs]


def run_jobs(jobs, desc):
    """Call work(path, *rest) for each job (work, path, *rest) whose path is
    not there yet, in several processes; work writes the file at path, or none.

    Where rest begins with a path, a file older than that is made again.
    Raises UserError or RunError that names the path.
    """
    total = len(jobs) if isinstance(jobs, list) else None
    for _ in map_in_processes(_run_job, jobs, desc, total,
                              lambda job: is_made(*job[1:3])):
        pass


def is_made(path, source):
    """Tell whether a file is there, whole, and not older than its source."""
    return file_bytes(path) > 0 and not (
        isinstance(source, str)
        and os.path.getmtime(source) > os.path.getmtime(path))


def _run_job(work, path, *rest):
    try:
        work(path, *rest)
    except (utils.UserError, ValueError) as error:
        raise utils.UserError(f'{path} cannot be made: {error}') from None
    except (utils.RunError, OSError) as error:
        raise utils.RunError(f'{path} cannot be made: {error}') from None
