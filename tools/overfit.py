"""The overfitting check: every head learns two images by one recipe.

    python -m tools.overfit [HEAD ...]

Run as a user runs it: train.py is stopped in the middle and resumed, eval.py
scores final.pth, and scores its weights again from a file of nothing else.
Exit status 1 where a head stays at an mIoU of 90 % or below.
"""
import json
import os
import signal
import subprocess
import tempfile
import time

import heads
import prepare
from lib.checkpoint import load, save
from tools.measure import finish_script, markdown_table, start_script
from utils import STOPPED, RunError, UserError, make_parser, run_main

SETTINGS = ('DATA_ROOT=toy N_CLASSES=6 TRAIN_SPLIT=train VAL_SPLIT=train '
            'ALLOW_OVERLAP=True N_LAYERS=18 STEM=plain PRETRAINED= STRIDE=8 '
            'CROP_SIZE=161 EM_CHANNELS=64 EM_BASES=16 BATCH_SIZE=2 BN_MOM=0.1 '
            'DROPOUT=0.0 LR=0.03 SCALES=1 ITER_MAX=100 ITER_VAL=0 '
            'NUM_WORKERS=0 DEVICES=-1').split()


def start(name, *words):
    """Start a script whose output is read."""
    return start_script(name, *words, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True)


def train(head):
    """Train, stopped at half and resumed; return the step of the stop."""
    words = [*SETTINGS, f'HEAD={head}', f'MODEL_DIR={head}', f'LOG_DIR={head}']
    process, log = start('train.py', *words), os.path.join(head, 'log.csv')
    while process.poll() is None:
        time.sleep(0.2)
        if os.path.exists(log):
            with open(log) as file:
                if len(file.readlines()) > 50:
                    break
    process.send_signal(signal.SIGTERM)
    finish_script(process, STOPPED)
    stopped_at = load(os.path.join(head, 'latest.pth'))['step']
    assert f'resumed after step {stopped_at}' in finish_script(
        start('train.py', *words))
    return stopped_at


def score(path, head):
    """Return the eval.json of a checkpoint."""
    finish_script(start('eval.py', path, 'DATA_ROOT=toy', 'VAL_SPLIT=train',
                        f'LOG_DIR={head}', 'DEVICES=-1'))
    with open(os.path.join(head, 'eval.json')) as file:
        return json.load(file)


def check(head):
    """Train and score a head; return (step of the stop, mIoU of final.pth,
    mIoU of its weights alone)."""
    stopped_at, path = train(head), os.path.join(head, 'final.pth')
    result, checkpoint = score(path, head), load(path)
    save({name: checkpoint[name] for name in ('net', 'settings')},
         'weights.pth')
    again = score('weights.pth', head)
    assert again['confusion'] == result['confusion'], head
    return stopped_at, result['mIoU'], again['mIoU']


def main():
    """Check the heads that the command line names, else all."""
    parser = make_parser(__doc__)
    parser.add_argument('heads', nargs='*', metavar='HEAD',
                        help='default: all')
    names, rows, low = parser.parse_args().heads or heads.HEADS, [], []
    unknown = ', '.join(name for name in names if name not in heads.HEADS)
    if unknown:
        raise UserError(f'{unknown}: heads are {", ".join(heads.HEADS)}')
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare.main(['toy', '--to', 'toy', '--train', '2', '--val', '1'])
        for name in names:
            stopped_at, mean_iou, again = check(name)
            rows.append([name, str(stopped_at), f'{100 * mean_iou:.2f}',
                         f'{100 * again:.2f}'])
            print(f'{name}: {100 * mean_iou:.2f}', flush=True)
            low += [name] * (mean_iou <= 0.9)
    print('\n' + markdown_table(
        ['HEAD', 'stopped at step', 'mIoU, %', 'by its weights alone, %'],
        rows))
    if low:
        raise RunError(f'mIoU of 90 % or below: {", ".join(low)}')


if __name__ == '__main__':
    run_main(main)
