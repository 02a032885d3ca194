"""Networks and runs that tests make in their own process, and how two runs
are compared."""
import csv
import os
import sys

import torch

import heads
import settings
import train
from lib import checkpoint


def save_network(path='a.pth', net=None, **more):
    """Save a network of the settings, in the way of a published checkpoint;
    return it, in evaluation mode."""
    torch.manual_seed(3)
    net = net or heads.build_network()
    torch.save({'net': net.state_dict(), 'step': 1, **more}, path)
    return net.eval()


def train_here(monkeypatch, *arguments):
    """Run train.py in this process; return {step: row of log.csv}."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    train.main()
    with open(os.path.join(settings.LOG_DIR, 'log.csv')) as file:
        return {int(row['step']): row for row in csv.DictReader(file)}


def run_state(path):
    """Return all that a checkpoint holds of a run, in comparable form."""
    saved = checkpoint.load(path)
    return {**saved['net'], 'momentum': [
        s['momentum_buffer'] for s in saved['optimizer']['state'].values()],
        'random': saved['random'], 'step': saved['step'],
        'lr': [g['lr'] for g in saved['optimizer']['param_groups']]}


def assert_equal_runs(path, want):
    """Compare a run's checkpoint, bit for bit, with another's run_state."""
    got = run_state(path)
    assert got.keys() == want.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=0)


class Gpu(str):
    """The CPU to torch, a GPU to train.py: metrics are read every 10 steps.
    """

    type = 'cuda'


def pretend_gpu(monkeypatch):
    """Have train.py believe that its CPU is a GPU."""
    settings.AMP = 'off'
    monkeypatch.setattr(train.distributed, 'join',
                        lambda devices: Gpu('cpu'))
    monkeypatch.setattr(train, 'log_start', lambda *a: None)
