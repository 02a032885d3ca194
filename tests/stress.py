"""Kill a run 60 times with SIGKILL, at random moments, and see that nothing
is lost: every checkpoint found afterwards is whole, the run goes on from it,
and its final weights equal those of a run that nobody disturbed.

    python tests/stress.py [KILLS]          about 15 minutes on two CPU cores

Every step saves latest.pth, so that many kills fall into a save. Prints its
figures, which README quotes; exit status 1 where anything was lost.
"""
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)

import prepare      # noqa: E402
import utils        # noqa: E402

SETTINGS = ('DATA_ROOT=toy N_CLASSES=6 TRAIN_SPLIT=train VAL_SPLIT= '
            'N_LAYERS=18 STEM=plain PRETRAINED= STRIDE=16 CROP_SIZE=33 '
            'EM_CHANNELS=32 EM_BASES=8 BATCH_SIZE=2 BN_MOM=0.1 DROPOUT=0.5 '
            'ITER_MAX=150 ITER_SAVE=10 NUM_WORKERS=1').split()


def begin(folder):
    """Start or go on with the run in a folder."""
    return subprocess.Popen(
        [sys.executable, os.path.join(REPO, 'train.py'), *SETTINGS,
         f'MODEL_DIR={folder}', f'LOG_DIR={folder}'],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def drop_old_steps(folder):
    """Keep the disk free of step_N.pth."""
    for name in os.listdir(folder):
        if name.startswith('step_'):
            os.remove(os.path.join(folder, name))


def kill_often(folder, kills):
    """Run to the end, killed up to `kills` times on the way; return the
    steps of the checkpoints found, and how many kills fell into a save."""
    found, in_save = [], 0
    while True:
        run = begin(folder)
        try:
            error = run.communicate(timeout=random.uniform(1, 11) if
                                    len(found) < kills else 3600)[1]
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            latest = os.path.join(folder, 'latest.pth')
            in_save += os.path.exists(latest + '.tmp')
            step = (utils.load(latest)['step'] if os.path.exists(latest)
                    else 0)
            assert step >= max(found, default=0), 'a checkpoint was lost'
            found.append(step)
            if os.path.isdir(folder):
                drop_old_steps(folder)
            continue
        assert run.returncode == 0, error
        return found, in_save


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    random.seed(66)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        prepare.main(['toy', '--to', 'toy', '--train', '12', '--val', '1'])
        whole = begin('whole')
        error = whole.communicate()[1]
        assert whole.returncode == 0, error
        want = utils.load('whole/final.pth')['net']
        done = in_saves = rounds = 0
        while done < kills:
            rounds += 1
            found, in_save = kill_often(f'run{rounds}', kills - done)
            done, in_saves = done + len(found), in_saves + in_save
            got = utils.load(f'run{rounds}/final.pth')['net']
            assert all(torch.equal(got[key], want[key]) for key in want)
            print(f'run {rounds}: killed after steps {found}; final weights '
                  f'equal', flush=True)
            drop_old_steps(f'run{rounds}')
    print(f'{done} kills, {in_saves} of them in a save: {done} whole resumes, '
          f'{rounds} runs with the undisturbed run\'s final weights; '
          f'{(time.monotonic() - began) / 60:.0f} minutes')


if __name__ == '__main__':
    main()
