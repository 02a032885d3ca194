"""results.csv: a line for each evaluation, in the folder where it runs."""
import csv
import fcntl
import os

from utils import RunError, UserError, git_hash

RESULTS = 'results.csv'
COLUMNS = ('experiment', 'checkpoint', 'sha256', 'weights', 'step', 'data',
           'split', 'images', 'stride', 'scales', 'flip', 'window',
           'inference', 'mean_over', 'mIoU', 'seconds', 'git', 'IoU')


def open_results():
    """Return results.csv open to append to, with its header, and locked
    against other processes until it is closed.

    Raises RunError where it cannot be written, UserError where its columns
    are others.
    """
    try:
        file = open(RESULTS, 'a+', newline='')
    except OSError as error:
        raise RunError(f'{RESULTS} cannot be written in this folder '
                       f'({error.strerror}); work in a folder of yours'
                       ) from None
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    text = file.read()
    if text and text.splitlines()[0] != ','.join(COLUMNS):
        file.close()
        raise UserError(f'{RESULTS} has other columns than '
                        f'{",".join(COLUMNS)}; move it away')
    if not text:
        file.write(','.join(COLUMNS))
    if not text.endswith('\n'):
        file.write('\n')
    return file


def append_result(scored, weights, result, seconds):
    """Append a line to results.csv.

    Args:
        scored: {column: value} of what was scored.
        weights: 'net' or 'average'.
        result: as eval.json has it; IoU is written 'name: 0.1234; ...'.
        seconds: that the evaluation took.
    """
    classes = '; '.join(f'{name}: ' + ('-' if iou is None else f'{iou:.4f}')
                        for name, iou in result['classes'].items())
    row = {'experiment': os.path.basename(os.getcwd()), 'weights': weights,
           **scored, 'mIoU': f'{result["mIoU"]:.6f}', 'git': git_hash(),
           'seconds': f'{seconds:.1f}', 'IoU': classes}
    with open_results() as file:
        csv.DictWriter(file, COLUMNS, lineterminator='\n').writerow({
            name: ' '.join(map(str, value)) if isinstance(
                value, (list, tuple)) else value
            for name, value in row.items()})
