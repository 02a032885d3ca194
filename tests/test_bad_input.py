"""Bad input ends in one clear line and an exit status of 2 (what was asked)
or 1 (the run), before the first step; nothing is lost.

    python -m pytest tests/test_bad_input.py
"""
import glob
import importlib
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import eval
import heads
import predict
import settings
import train
import utils
from conftest import REPO, refused
from lib import checkpoint
from lib.images import read_label
from utils import RunError


def find_scripts():
    """Return {module: text} of what is run as a program."""
    found = {}
    for path in sorted(glob.glob(os.path.join(REPO, '*.py'))
                       + glob.glob(os.path.join(REPO, 'tools', '*.py'))):
        text = utils.read_text(path)
        if "if __name__ == '__main__':" in text:
            found[os.path.relpath(path, REPO)[:-3].replace('/', '.')] = text
    return found


SCRIPTS = find_scripts()


# ------------------------------------------------- the command line
@pytest.mark.parametrize('name', SCRIPTS)
def test_help(name, monkeypatch, capsys):
    """Usage, what is written, the settings by section; 80 columns."""
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', '--help'])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith('usage: ')
    takes_settings = 'settings.override' in SCRIPTS[name]
    assert ('\n  EVAL_SCALES = (1.0,) ' in text) == takes_settings
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize('name', SCRIPTS)
def test_an_unknown_option_is_named(name, monkeypatch, capsys):
    code, line = refused(importlib.import_module(name).main, '--nope',
                         monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and ('--nope' in line or 'required' in line)


@pytest.mark.parametrize('name, arguments, told', (
    ('tools.bench', ['speed'], 'speed: areas are loader, '),
    ('tools.stress', ['0'], '0: name a number of kills'),
    ('tools.compare_heads', ['--camvid', '.'], '--camvid .: no such folder'),
    ('tools.compare_heads', ['--weights', 'gone', '--table'],
     '--weights gone is neither a file nor a known name'),
    ('tools.compare_heads', ['--table', '--to', 'file'],
     '--to file: file is a file'),
    ('dataset', ['LOG_DIR=file'], 'file/samples.png cannot be written'),
    ('heads', ['LR'], 'LR: a setting is written KEY=VALUE')))
def test_other_scripts_refuse_in_a_line(name, arguments, told, small,
                                        monkeypatch, capsys):
    with open('file', 'w'):
        pass
    _, line = refused(importlib.import_module(name).main, *arguments,
                      monkeypatch=monkeypatch, capsys=capsys)
    assert line.startswith(f'script.py: {told}')
    assert os.listdir() == ['file']


def test_a_closed_pipe_ends_a_program_quietly(monkeypatch, capsys):
    """As `python heads.py | head -1` closes it."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as pipe, pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, 'stdout', pipe)
        utils.run_main(lambda: print('a line'))
    assert stop.value.code == 141 and capsys.readouterr().err == ''


@pytest.mark.parametrize('allocate', (
    lambda: torch.empty(2 ** 50), lambda: np.empty(2 ** 50)))
def test_too_little_memory_is_told_with_the_remedy(allocate, monkeypatch,
                                                   capsys):
    code, line = refused(allocate, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1 and 'memory. Lower BATCH_SIZE or CROP_SIZE' in line


# ------------------------------------------------- data, settings, files


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
    refuse.root, refuse.capsys = root, capsys
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
    expect(bad('N_CLASSES=2'), 'class 0 alone', '255, void', 'as 1')


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
    eval.check_labels(dataset.Segmentation('train', train=True))
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
    ('FOO=1', 'there is no setting FOO; --help lists them'),
    ('--lr', 'KEY=VALUE'),
    ('lr=0.1', 'nearest is LR'),
    ('BATCH_SIZE=0', '1 to 65,536'),
    ('STRIDE=0', '8, 14, 16, 32'),
    ('NUM_WORKERS=-1', '0 to 1,024'),
    ('SEED=100000000000000000000000', '0 to 4,294,967,295'),
    ('ITER_MAX=100000000000000000000', '1 to 100,000,000'),
    ('EM_BASES=1000000000000', '1 to 8,192'),
    ('STAGE_NUM_EVAL=100000000000000000000', '0 to 1,000'),
    ('CROP_SIZE=1', 'STRIDE=16: at least 33'),
    ('CROP_SIZE=8194', '1 to 8,193'),
    ('LR=nan', 'type float'),
    ('LR=1e400', 'LR=inf: it can be 0 to 1,000,000'),
    ('SCALES=1e-9', 'SCALES=(1e-09,): it can be 0.05 to 16'),
    ('EVAL_SCALES=1e300', '0.05 to 16'),
    ('EVAL_SCALES=()', 'EVAL_SCALES=(): it cannot be empty'),
    ('MODEL_DIR=', 'it cannot be empty'),
    ('EVAL_WINDOW=-1', '0 to 65,536'),
    ('DROPOUT=1.5', '0 to 0.99'),
    ('FREEZE=all', "'backbone'"),
    ('AMP=int8', "'bf16'"),
    ('INFERENCE=fast', "'plain', 'folded', 'bf16', 'comp"),
    ('CLASS_WEIGHTS=1,2', '6 numbers'),
    ('CLASS_WEIGHTS=auto', 'BALANCE_CLASSES=True'),
    ('OHEM_LEAST=0.1', 'is now OHEM_MIN_KEPT'),
    ('DEVICES=99', 'DEVICES=[99]: this machine has'),
    ('models/x.pth', 'only KEY=VALUE')))
def test_settings(bad, word, told):
    expect(bad(word), word.split('=')[0], told)


def test_backbone_weights(bad):
    expect(bad('PRETRAINED=nowhere.pth'), 'nowhere.pth', 'docs/data.md')
    torch.save({'conv1.weight': torch.zeros(64, 3, 7, 7)}, 'part.pth')
    expect(bad('PRETRAINED=part.pth'), 'part.pth', 'lacks layer')
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
    os.makedirs('models', exist_ok=True)
    os.replace('bad.pth', 'models/latest.pth')
    code, line = bad()
    assert code == 2 and 'could run any code' in line
    assert not os.path.exists('pwned')


def test_a_record_that_cannot_be_is_named(bad):
    torch.save({'net': {}, 'step': 1, 'settings': {'EM_BASES': 'x'}},
               'a.pth')
    expect(bad('a.pth', main=eval.main), "a.pth: EM_BASES='x': "
           'EM_BASES takes a value of type int')


def test_settings_edited_by_hand(bad, monkeypatch):
    """Refused before anything else is looked at, by each script."""
    for name, value, told in (
            ('LR', '0.1', "LR='0.1': LR takes a value of type float, such as "
                          "LR = 0.1"),
            ('BATCHSIZE', 4, 'BATCHSIZE is no setting; the nearest is BATCH'),
            ('DEVICES', -1, 'DEVICES=-1: ')):
        with monkeypatch.context() as edited:
            edited.setattr(settings, name, value, raising=False)
            for main in train.main, eval.main, predict.main:
                code, line = refused(main, 'a.pth' if main == eval.main else
                                     'LR=0.1', monkeypatch=monkeypatch,
                                     capsys=bad.capsys)
                assert code == 2 and f'settings.py: {told}' in line


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
           bad.image, 'cannot be read as an image')


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
