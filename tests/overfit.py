"""Learn two pictures by heart with every head, by one recipe, as a user
runs it: train.py is stopped in the middle and goes on, eval.py scores what
final.pth has, and scores its weights again from a file of nothing else.

    python tests/overfit.py [HEAD ...]

Prints a line for each head, which README quotes; exit status 1 where one
stays at an mIoU of 0.9 or below.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)

import baselines    # noqa: E402
import prepare      # noqa: E402
import utils        # noqa: E402

SETTINGS = ('DATA_ROOT=toy N_CLASSES=6 TRAIN_SPLIT=train VAL_SPLIT=train '
            'N_LAYERS=18 STEM=plain PRETRAINED= STRIDE=8 CROP_SIZE=161 '
            'EM_CHANNELS=64 EM_BASES=16 BATCH_SIZE=2 BN_MOM=0.1 DROPOUT=0.0 '
            'LR=0.03 SCALES=1 ITER_MAX=100 ITER_VAL=0 NUM_WORKERS=0 '
            'ALLOW_OVERLAP=True '
            'DEVICES=-1').split()


def script(name, *words):
    """Return a script of the project, running."""
    return subprocess.Popen([sys.executable, os.path.join(REPO, name), *words],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def finish(running, status):
    """Wait for a script, which ends with this status; return its output."""
    out, error = running.communicate()
    assert running.returncode == status, error
    return out


def train(head):
    """Train by one recipe, stopped at half; return the step of the stop."""
    words = [*SETTINGS, f'HEAD={head}', f'MODEL_DIR={head}', f'LOG_DIR={head}']
    running, log = script('train.py', *words), os.path.join(head, 'log.csv')
    while running.poll() is None:
        time.sleep(0.2)
        if os.path.exists(log):
            with open(log) as file:
                if len(file.readlines()) > 50:
                    break
    running.send_signal(signal.SIGTERM)
    finish(running, utils.STOPPED)
    stopped = utils.load(os.path.join(head, 'latest.pth'))['step']
    assert f'going on after step {stopped}' in finish(
        script('train.py', *words), 0)
    return stopped


def score(path, head):
    """Return what eval.py says of a checkpoint."""
    finish(script('eval.py', path, 'DATA_ROOT=toy', 'VAL_SPLIT=train',
                  f'LOG_DIR={head}', 'DEVICES=-1'), 0)
    with open(os.path.join(head, 'eval.json')) as file:
        return json.load(file)


def main():
    heads, low = sys.argv[1:] or baselines.HEADS, []
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        prepare.main(['toy', '--to', 'toy', '--train', '2', '--val', '1'])
        print(f'\n{"HEAD":14}{"stopped at":>11}{"mIoU":>8}{"again":>8}')
        for head in heads:
            stopped = train(head)
            path = os.path.join(head, 'final.pth')
            found, saved = score(path, head), utils.load(path)
            utils.save({name: saved[name] for name in ('net', 'settings')},
                       'weights.pth')
            again = score('weights.pth', head)
            assert again['confusion'] == found['confusion'], head
            low += [head] * (found['mIoU'] <= 0.9)
            print(f'{head:14}{stopped:11}{100 * found["mIoU"]:8.2f}'
                  f'{100 * again["mIoU"]:8.2f}', flush=True)
    if low:
        sys.exit(f'0.9 or below: {", ".join(low)}')


if __name__ == '__main__':
    main()
