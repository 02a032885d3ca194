"""The stress test: a run is killed 60 times by SIGKILL, at random moments.

    python -m tools.stress [KILLS]      about 15 minutes on two CPU cores

Nothing may be lost: every checkpoint found after a kill is whole, the run is
resumed from it, and its final weights equal those of a run that nobody
disturbed. Every step saves latest.pth, so that many kills fall into a save.
Exit status 1 where anything was lost.
"""
import os
import random
import subprocess
import tempfile
import time

import torch

import prepare
from lib.checkpoint import load
from tools.measure import finish_script, start_script
from utils import UserError, make_parser, run_main

SETTINGS = ('DATA_ROOT=toy N_CLASSES=6 TRAIN_SPLIT=train VAL_SPLIT= '
            'N_LAYERS=18 STEM=plain PRETRAINED= STRIDE=16 CROP_SIZE=33 '
            'EM_CHANNELS=32 EM_BASES=8 BATCH_SIZE=2 BN_MOM=0.1 DROPOUT=0.5 '
            'ITER_MAX=150 ITER_SAVE=10 NUM_WORKERS=1').split()


def start(folder):
    """Start or resume the run of a folder."""
    return start_script('train.py', *SETTINGS, f'MODEL_DIR={folder}',
                        f'LOG_DIR={folder}', stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE, text=True)


def remove_old_steps(folder):
    """Remove step_N.pth, to spare the disk."""
    for name in os.listdir(folder):
        if name.startswith('step_'):
            os.remove(os.path.join(folder, name))


def kill_often(folder, kills):
    """Run to the end, killed up to `kills` times on the way; return (steps of
    the checkpoints found, how many kills fell into a save)."""
    found, in_save = [], 0
    while len(found) < kills:
        process = start(folder)
        try:
            error = process.communicate(timeout=random.uniform(1, 11))[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            latest = os.path.join(folder, 'latest.pth')
            in_save += os.path.exists(latest + '.tmp')
            step = load(latest)['step'] if os.path.exists(latest) else 0
            assert step >= max(found, default=0), 'a checkpoint was lost'
            found.append(step)
            if os.path.isdir(folder):
                remove_old_steps(folder)
        else:
            assert process.returncode == 0, error
            return found, in_save
    finish_script(start(folder))
    return found, in_save


def stress(kills):
    """Kill runs until `kills` kills are done; return (kills, kills in a save,
    runs)."""
    finish_script(start('undisturbed'))
    expected = load('undisturbed/final.pth')['net']
    done = in_saves = runs = 0
    while done < kills:
        runs += 1
        folder = f'run{runs}'
        steps, in_save = kill_often(folder, kills - done)
        done, in_saves = done + len(steps), in_saves + in_save
        net = load(f'{folder}/final.pth')['net']
        assert all(torch.equal(net[key], expected[key]) for key in expected)
        print(f'run {runs}: killed after steps {steps}; final weights equal',
              flush=True)
        remove_old_steps(folder)
    return done, in_saves, runs


def main():
    """Kill as often as the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument('kills', nargs='?', type=int, default=60,
                        metavar='KILLS')
    kills, began = parser.parse_args().kills, time.monotonic()
    if kills < 1:
        raise UserError(f'{kills}: name a number of kills, 1 or more')
    random.seed(66)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare.main(['toy', '--to', 'toy', '--train', '12', '--val', '1'])
        done, in_saves, runs = stress(kills)
    print(f'{done} kills, {in_saves} of them in a save: {done} whole resumes, '
          f'{runs} runs with the undisturbed run\'s final weights; '
          f'{(time.monotonic() - began) / 60:.0f} minutes')


if __name__ == '__main__':
    run_main(main)
