"""Bad input ends in one clear line and an exit status of 2 (what was asked)
or 1 (the run), before the first step; nothing is lost.

    python -m pytest tests/test_bad_input.py
"""
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import heads
import predict
import settings
import train
from conftest import refused
from lib import checkpoint
from lib.images import read_label
from utils import RunError


@pytest.fixture
def bad(small, toy, tmp_path, monkeypatch, capsys):
    """A copy of the toy set to spoil, and how train.py refuses it."""
    root = tmp_path / 'set'
    shutil.copytree(toy, root)
    settings.DATA_ROOT = str(root)

    before = settings.as_dict()

    def refuse(*arguments, main=train.main):
        vars(settings).update(before)
        settings._given.clear()
        return refused(main, *arguments, monkeypatch=monkeypatch,
                       capsys=capsys)
    refuse.root = root
    refuse.ids = (root / 'ImageSets/Segmentation/train.txt').read_text() \
        .split()
    refuse.label = root / 'SegmentationClassAug' / f'{refuse.ids[3]}.png'
    refuse.image = root / 'JPEGImages' / f'{refuse.ids[3]}.jpg'
    return refuse


def expect(outcome, *told, status=2):
    """The line holds all that is told; nothing was trained."""
    code, line = outcome
    assert code == status and all(str(part) in line for part in told), line
    assert not os.path.exists('models/latest.pth')


def test_data_root_and_splits(bad):
    expect(bad('DATA_ROOT=nowhere'), 'DATA_ROOT=nowhere', 'prepare.py')
    expect(bad('TRAIN_SPLIT=train2'), 'train2.txt', 'train, val')
    lists = bad.root / 'ImageSets' / 'Segmentation'
    (lists / 'empty.txt').write_text('\n')
    expect(bad('VAL_SPLIT=empty'), 'empty.txt', 'at least one')
    expect(bad('BATCH_SIZE=13'), 'BATCH_SIZE=13', '12 images')
    (lists / 'odd.txt').write_text(f'{bad.ids[0]}\nnobody\n')
    expect(bad('TRAIN_SPLIT=odd'), 'nobody.jpg', 'odd.txt')
    bad.label.unlink()
    expect(bad(), bad.label)


def test_labels(bad):
    label = read_label(bad.label)
    label[0, 0] = 6
    Image.fromarray(label).save(bad.label)
    expect(bad(), bad.label, 'value 6', 'N_CLASSES=6')
    Image.fromarray(label[1:]).save(bad.label)
    expect(bad(), bad.image.name, 'pixels, its label')
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(bad.label)
    expect(bad(), bad.label, 'mode RGB')
    bad.label.write_bytes(bad.label.read_bytes()[:40])
    expect(bad(), bad.label, 'cannot be read as a PNG')


def test_masks_of_0_and_255(bad):
    """Two classes are meant; with 255 for void nothing would be left."""
    (bad.root / 'classes.txt').unlink()
    for path in (bad.root / 'SegmentationClassAug').iterdir():
        label = read_label(path)
        Image.fromarray(np.uint8(255 * (label > 0))).save(path)
    expect(bad('N_CLASSES=2'), '0 and 255 alone', 'as 1')


@pytest.mark.parametrize('workers', (0, 1))
def test_a_truncated_image_is_named_when_it_is_read(bad, workers):
    bad.image.write_bytes(bad.image.read_bytes()[:-700])
    expect(bad(f'NUM_WORKERS={workers}', 'ITER_MAX=6'), bad.image,
           'cannot be read as an image')


def test_a_class_that_never_occurs_is_warned_of(bad, monkeypatch, capsys):
    for path in (bad.root / 'SegmentationClassAug').iterdir():
        label = read_label(path)
        label[label == 3] = 0
        Image.fromarray(label).save(path)
    eval.open_split('train', train=True)
    assert 'warning: no pixel of train is triangle\n' in (
        capsys.readouterr().out)


def test_a_crop_off_the_grid_is_warned_of(small, capsys):
    settings.CROP_SIZE = 70
    train.check_run(1)
    assert 'use 65' in capsys.readouterr().out


def test_classes(bad):
    expect(bad('N_CLASSES=7'), 'N_CLASSES=7', '6 classes', 'N_CLASSES=6')
    expect(bad('EVAL_CLASSES=1,6'), 'EVAL_CLASSES=(1, 6)', '0 to 5')
    (bad.root / 'classes.txt').write_text('cat 1 2\n' * 6)
    expect(bad(), 'classes.txt', "'cat 1 2'", 'name r g b')


@pytest.mark.parametrize('word, told', (
    ('CROPSIZE=65', 'nearest is CROP_SIZE'),
    ('CROP_SIZE=big', 'type int'),
    ('LR=fast', 'type float'),
    ('N_LAYERS=20', '18, 34, 50, 101, 152'),
    ('HEAD=emma', "'ema', 'fcn'"),
    ('BATCH_SIZE=0', 'at least 1'),
    ('STRIDE=0', '8, 16, 32'),
    ('NUM_WORKERS=-1', 'at least 0'),
    ('SEED=-1', 'at least 0'),
    ('EM_BASES=0', 'at least 1'),
    ('SCALES=0', 'SCALES=(0.0,): it can be above 0'),
    ('EVAL_SCALES=()', 'EVAL_SCALES=(): name at least one'),
    ('EVAL_WINDOW=-1', 'at least 0'),
    ('DROPOUT=1.5', 'at least 0 and below 1'),
    ('FREEZE=all', "'backbone'"),
    ('AMP=int8', "'bf16'"),
    ('INFERENCE=fast', "'plain', 'folded', 'bf16'"),
    ('CLASS_WEIGHTS=1,2', '6 numbers'),
    ('CLASS_WEIGHTS=auto', 'BALANCE_CLASSES=True'),
    ('OHEM_LEAST=0.1', 'is now OHEM_MIN_KEPT'),
    ('DEVICES=99', 'DEVICES=[99]: this machine has'),
    ('models/x.pth', 'only KEY=VALUE')))
def test_settings(bad, word, told):
    expect(bad(word), word.split('=')[0], told)


def test_backbone_weights(bad):
    expect(bad('PRETRAINED=nowhere.pth'), 'nowhere.pth', 'nearest known')
    torch.save({'conv1.weight': torch.zeros(64, 3, 7, 7)}, 'part.pth')
    expect(bad('PRETRAINED=part.pth'), 'part.pth', 'lacks bn1.weight')
    with open('part.pth', 'rb') as file:
        half = file.read()[:500]
    with open('half.pth', 'wb') as file:
        file.write(half)
    expect(bad('PRETRAINED=half.pth'), 'half.pth', 'truncated')
    torch.save({'conv1.weight': torch.zeros(128, 3, 7, 7)}, 'other.pth')
    expect(bad('PRETRAINED=other.pth', 'PRETRAINED_PARTIAL=True'),
           'other.pth', 'conv1.weight (128, 3, 7, 7) for (64, 3, 7, 7)')


class Hostile:
    def __reduce__(self):
        return open, ('pwned', 'w')


def test_a_hostile_checkpoint_runs_nothing(bad):
    torch.save({'net': Hostile(), 'step': 1}, 'bad.pth')
    for main, words in ((train.main, ['PRETRAINED=bad.pth']),
                        (eval.main, ['bad.pth']),
                        (predict.main, [bad.image, 'bad.pth'])):
        expect(bad(*words, main=main), 'bad.pth', 'could run any code')
    os.replace('bad.pth', 'models/latest.pth')
    code, line = bad()
    assert code == 2 and 'could run any code' in line
    assert not os.path.exists('pwned')


def test_evaluation(bad):
    os.makedirs('models')
    expect(bad(main=eval.main), 'models/final.pth is not there')
    expect(bad('a.pth', main=eval.main), 'a.pth is not there')
    torch.save({'net': {}, 'step': 1}, 'a.pth')
    expect(bad('a.pth', main=eval.main), 'a.pth', 'lacks')
    code, line = bad('a.pth', 'N_CLASSES=5.5', main=eval.main)
    assert code == 2 and 'N_CLASSES=5.5' in line


def test_prediction(bad, capsys):
    expect(bad('no.jpg', main=predict.main), 'no.jpg is not there')
    twin = bad.root / bad.image.name
    shutil.copy(bad.image, twin)
    expect(bad(bad.image, twin, main=predict.main), 'would both be written')
    expect(bad('a.pth', main=predict.main), 'a.pth: name images')
    expect(bad(bad.image, 'a.pth', 'b.pth', main=predict.main),
           'one checkpoint at most')
    expect(bad(bad.image, main=predict.main), 'models/final.pth')


def test_an_image_of_too_many_pixels(bad, monkeypatch):
    """Pillow refuses a header of more pixels than anything honest has."""
    torch.save({'net': heads.build_network().state_dict(), 'step': 1},
               'a.pth')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40)
    expect(bad(bad.image, 'a.pth', 'STRIDE=16', main=predict.main),
           bad.image, 'cannot be read as an image', status=1)


def test_folders_that_cannot_be_written(bad):
    with open('file', 'w'):
        pass
    for name in ('MODEL_DIR', 'LOG_DIR'):
        expect(bad(f'{name}=file/inside'), f'{name}=file/inside', status=1)


def test_the_old_checkpoint_survives_a_failed_save(bad, monkeypatch):
    checkpoint.save({'step': 1}, 'models/latest.pth')

    def full(state, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise RuntimeError('unexpected pos 4 vs 8')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(RunError, match='models/latest.pth cannot be written'):
        checkpoint.save({'step': 2}, 'models/latest.pth')
    assert checkpoint.load('models/latest.pth') == {'step': 1}
    assert os.listdir('models') == ['latest.pth']
