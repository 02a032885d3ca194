"""Does a log hold what was written, in full, and survive a resume?

    python -m pytest tests/test_logger.py
"""
import csv
import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from files import full_disk
from lib.logger import Logger
from utils import RunError


def write_log(folder, start, steps):
    """Log steps into folder; return the lines of log.csv."""
    logger = Logger(str(folder), start)
    for step in steps:
        logger.log_metrics(step, loss=step / 3, lr=0.5)
    logger.close()
    return (folder / 'log.csv').read_text().splitlines()


def test_log_by_hand(tmp_path):
    logger = Logger(str(tmp_path / 'new'))
    logger.log_metrics(1, loss=1 / 3, lr=0.009)
    logger.log_metrics(20, lr=1e-5, loss=2, val_mIoU=0.5, images_per_s=12.25)
    with open(tmp_path / 'new' / 'log.csv') as file:     # before close()
        rows = [{name: cell for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]
    assert rows == [
        {'step': '1', 'loss': '0.333333333', 'lr': '0.009'},
        {'step': '20', 'loss': '2', 'lr': '1e-05', 'val_mIoU': '0.5',
         'images_per_s': '12.25'}]
    logger.close()
    assert list((tmp_path / 'new').glob('events*'))


def test_iou_is_0_to_1_in_the_file_and_per_cent_on_the_board(tmp_path):
    """A description stands before the first event alone."""
    logger = Logger(str(tmp_path))
    for step in (1, 2):
        logger.log_metrics(step, val_mIoU=0.25, loss=0.5,
                           **{'IoU/cat': 0.75, 'EM/usage_entropy': 0.125})
    logger.close()
    with open(tmp_path / 'log.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['val_mIoU'] for row in rows] == ['0.25'] * 2
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, want in (('Accuracy/val_mIoU', 25), ('IoU/cat', 75),
                      ('Curves/loss', 0.5), ('EM/usage_entropy', 0.125)):
        assert [(event.step, event.value) for event in events.Scalars(tag)
                ] == [(1, want), (2, want)]
        assert [event.step for event in events.Tensors(tag)] == [1]


def test_log_holds_a_float32_loss_in_full(tmp_path):
    logger = Logger(str(tmp_path))
    losses = np.random.default_rng(0).random(100, np.float32)
    for loss in losses:
        logger.log_metrics(1, loss=float(loss))
    logger.close()
    read = np.genfromtxt(tmp_path / 'log.csv', delimiter=',', skip_header=1)
    assert (read[:, 1].astype(np.float32) == losses).all()


def test_a_resume_drops_what_comes_after(tmp_path):
    whole = write_log(tmp_path, 0, range(1, 13))
    assert len(whole) == 13
    assert write_log(tmp_path, 10, []) == whole[:11]
    assert write_log(tmp_path, 10, [11, 12]) == whole
    assert write_log(tmp_path, 0, [1]) == whole[:2]   # a new run
    with open(tmp_path / 'log.csv', 'a') as file:
        file.write('\n12,0.')                         # cut off in a line
    assert write_log(tmp_path, 11, [12])[2:] == whole[12:]


def test_a_resume_takes_over_a_log_of_other_columns(tmp_path):
    (tmp_path / 'log.csv').write_text(
        'step,rate,loss\n1,0.5,0.25\n2,0.5,0.125\n3,0.5,0.1\n')
    assert write_log(tmp_path, 2, [3]) == [
        ','.join(Logger.COLUMNS), '1,0.25,,,,,,,', '2,0.125,,,,,,,',
        '3,1,0.5,,,,,,']


def test_a_disk_that_fills_is_an_error_at_the_end(tmp_path):
    """Nothing waits, and no part of a later line is written."""
    logger = Logger(str(tmp_path))
    logger.log_metrics(1, loss=0.5)
    assert not logger.error
    with full_disk():
        logger.log_metrics(2, loss=0.25)
    assert 'File too large' in str(logger.error)
    logger.log_metrics(3, loss=0.125)
    logger.add_images(3, [('image', np.zeros((4, 4, 3), np.uint8))] * 30)
    with pytest.raises(RunError, match=f'LOG_DIR={tmp_path} cannot be writ'):
        logger.close()
    assert len((tmp_path / 'log.csv').read_text().splitlines()) == 2
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars('Curves/loss')] == [1]


def test_a_disk_that_is_full_at_the_start_is_an_error(tmp_path):
    with full_disk(), pytest.raises(RunError, match=f'LOG_DIR={tmp_path} '):
        Logger(str(tmp_path))
    logger = Logger(str(tmp_path))
    with full_disk(), pytest.raises(RunError, match='is the disk full'):
        logger.log_settings({'LR': 0.1})


def test_a_disk_with_room_for_a_part_of_a_line(tmp_path):
    """The part is no row: its loss would be 0."""
    logger = Logger(str(tmp_path))
    with full_disk((tmp_path / 'log.csv').stat().st_size + 3):
        logger.log_metrics(1, loss=0.5)
    assert logger.error
    assert (tmp_path / 'log.csv').read_text().endswith('\n1,0')
    assert write_log(tmp_path, 1, [3])[1:] == ['3,1,0.5,,,,,,']


def test_settings_are_written_beside_the_log(tmp_path):
    logger = Logger(str(tmp_path))
    values = {'LR': 0.1, 'SCALES': (0.5, 1.0), 'HEAD': 'ema', 'CACHE': False}
    logger.log_settings(values)
    logger.close()
    with open(tmp_path / 'settings.json') as file:
        assert json.load(file) == {**values, 'SCALES': [0.5, 1.0]}


@pytest.mark.parametrize('rank, files', [(0, True), (1, False)])
def test_the_first_process_writes_for_all(rank, files, tmp_path, monkeypatch):
    for name, value in (('RANK', rank), ('LOCAL_RANK', rank),
                        ('WORLD_SIZE', 2)):
        monkeypatch.setenv(name, str(value))
    drawn = []

    def draw():
        drawn.append(1)
        yield 'image', np.zeros((4, 4, 3), np.uint8)
    logger = Logger(str(tmp_path / 'log'))
    logger.log_metrics(1, loss=1.0)
    logger.add_images(1, draw())
    logger.log_settings({'LR': 0.1})
    logger.close()
    assert (tmp_path / 'log').exists() == files == bool(drawn)
