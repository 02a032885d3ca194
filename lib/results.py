"""What an evaluation leaves: a table on the screen, eval.json and its charts,
and a line of results.csv, in the folder where it runs.
"""
import contextlib
import csv
import fcntl
import io
import os

from lib import visualize
from lib.images import save_image
from utils import (
    PER_CLASS,
    RunError,
    UserError,
    atomic_write,
    forked_from,
    git_hash,
    log,
    read_text,
    save_json,
)

RESULTS = 'results.csv'
COLUMNS = ('experiment', 'parent', 'checkpoint', 'sha256', 'weights', 'step',
           'data', 'split', 'images', 'stride', 'scales', 'flip', 'window',
           'inference', 'stages', 'mean_over', 'mIoU', 'mF1', 'seconds', 'git',
           'IoU', 'precision', 'recall', 'F1')
HEADER = ','.join(COLUMNS) + '\n'


def open_results():
    """Return results.csv open to append to, with its header, and locked
    against other processes until it is closed. A file of an older version
    gets the columns that it lacks, empty.

    Raises RunError where it cannot be written, UserError where its columns
    are others.
    """
    try:
        while True:
            with contextlib.ExitStack() as stack:   # closed, unless returned
                file = stack.enter_context(open(
                    RESULTS, 'a', encoding='utf-8', newline=''))
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_in_place(file) and _has_header(file):
                    stack.pop_all()
                    return file
    except OSError as error:
        raise RunError(f'{RESULTS} cannot be written in this folder '
                       f'({error.strerror}); work in a folder of yours'
                       ) from None


def _is_in_place(file):
    """Tell whether nobody has moved or replaced the file since it was opened,
    while this process waited for the lock."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(RESULTS))
    return False


def _has_header(file):
    """Give an empty file the header, end a line that an editor left open;
    replace a file with another header, and return False."""
    with open(RESULTS, 'rb') as reader:
        content = reader.read()
    if content and not content.startswith(HEADER.encode()):
        _add_columns()
        return False
    if not content:
        file.write(HEADER)
    elif not content.endswith(b'\n'):
        file.write('\n')
    return True


def _add_columns():
    """Rewrite results.csv with all columns."""
    reader = csv.DictReader(io.StringIO(read_text(RESULTS)))
    try:
        rows = list(reader)
        other = ', '.join(repr(name) for name in reader.fieldnames or ()
                          if name not in COLUMNS)
        if any(None in row for row in rows):        # where the reader puts it
            other = other or 'a line is longer than the header'
    except csv.Error as error:
        other = str(error)
    if other:
        raise UserError(f'{RESULTS} has other columns than those of eval.py '
                        f'({other}); move it away')
    with atomic_write(os.path.realpath(RESULTS)) as path, open(
            path, 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def append_result(scored, weights, result, seconds):
    """Append a line to results.csv.

    Args:
        scored: {column: value} of what was scored.
        weights: 'net' or 'average'.
        result: as eval.json has it; the values of classes are written
            'name: 0.1234; ...'.
        seconds: that the evaluation took.
    """
    classes = {name: '; '.join(
        f'{each}: ' + ('-' if value is None else f'{value:.4f}')
        for each, value in result[
            'classes' if name == 'IoU' else name].items())
        for name in PER_CLASS}
    row = {'experiment': os.path.basename(os.getcwd()), 'weights': weights,
           'parent': forked_from().get('parent', ''), **scored,
           'mIoU': f'{result["mIoU"]:.6f}', 'mF1': f'{result["mF1"]:.6f}',
           'git': git_hash(), 'seconds': f'{seconds:.1f}', **classes}
    with open_results() as file:
        csv.DictWriter(file, COLUMNS, lineterminator='\n').writerow({
            name: ' '.join(map(str, value)) if isinstance(
                value, (list, tuple)) else value
            for name, value in row.items()})


# ------------------------------------------------- table, eval.json
def log_scores(classes, means):
    """Log a table of scores in per cent.

    Args:
        classes: {score: {name: 0..1, or None}}, of PER_CLASS.
        means: {name: 0..1}, as of utils.scores.
    """
    names = list(classes['IoU'])
    width = max(20, *map(len, names))
    log(f'{"class, %":{width}}' + ''.join(f'{key:>11}' for key in classes))
    for name in names:
        cells = ['-' if values[name] is None else f'{100 * values[name]:.2f}'
                 for values in classes.values()]
        log(f'{name:{width}}' + ''.join(f'{cell:>11}' for cell in cells))
    log('  '.join(f'{name} {100 * value:.2f} %'
                  for name, value in means.items()))


def write_report(result, names, colours, folder):
    """Write eval.json, confusion.png and classes.png into a folder."""
    save_json(result, os.path.join(folder, 'eval.json'))
    save_image(visualize.plot_confusion(result['confusion'], names),
               os.path.join(folder, 'confusion.png'))
    save_image(visualize.plot_iou(result['classes'], colours, result['mIoU']),
               os.path.join(folder, 'classes.png'))
