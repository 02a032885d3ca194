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

import baselines
import dataset
import eval
import predict
import settings
import train
import utils
from conftest import refused


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
    label = dataset.read_label(bad.label)
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
        label = dataset.read_label(path)
        Image.fromarray(np.uint8(255 * (label > 0))).save(path)
    expect(bad('N_CLASSES=2'), '0 and 255 alone', 'as 1')


@pytest.mark.parametrize('workers', (0, 1))
def test_a_truncated_picture_is_named_when_it_is_met(bad, workers):
    bad.image.write_bytes(bad.image.read_bytes()[:-700])
    expect(bad(f'NUM_WORKERS={workers}', 'ITER_MAX=6'), bad.image,
           'cannot be read as a picture')


def test_a_class_that_never_occurs_is_warned_of(bad, monkeypatch, capsys):
    for path in (bad.root / 'SegmentationClassAug').iterdir():
        label = dataset.read_label(path)
        label[label == 3] = 0
        Image.fromarray(label).save(path)
    eval.open_split('train', train=True)
    assert 'warning: no pixel of train is triangle\n' in (
        capsys.readouterr().out)


def test_a_crop_off_the_grid_is_warned_of(small, capsys):
    settings.CROP_SIZE = 70
    train.check_settings()
    assert '65 is' in capsys.readouterr().out


def test_classes(bad):
    expect(bad('N_CLASSES=7'), 'N_CLASSES=7', '6 classes', 'N_CLASSES=6')
    expect(bad('EVAL_CLASSES=1,6'), 'no class 6')
    (bad.root / 'classes.txt').write_text('cat 1 2\n' * 6)
    expect(bad(), 'classes.txt', "'cat 1 2'", 'name r g b')


def test_settings(bad):
    expect(bad('CROPSIZE=65'), 'CROPSIZE', 'nearest is CROP_SIZE')
    expect(bad('CROP_SIZE=big'), 'CROP_SIZE=big', 'int')
    expect(bad('LR=fast'), 'LR=fast', 'float')
    expect(bad('N_LAYERS=20'), 'N_LAYERS=20', '18, 34, 50, 101, 152')
    expect(bad('HEAD=emma'), 'HEAD=emma', 'ema, fcn')
    expect(bad('BATCH_SIZE=0'), 'BATCH_SIZE=0', 'at least 1')
    for word in ('STRIDE=0', 'NUM_WORKERS=-1', 'SEED=-1', 'EM_BASES=0'):
        expect(bad(word), word, 'at least')
    expect(bad('SCALES=0'), 'SCALES=(0.0,)', 'above 0')
    expect(bad('EVAL_SCALES=()'), 'EVAL_SCALES', 'at least one')
    expect(bad('EVAL_WINDOW=-1'), 'EVAL_WINDOW=-1', 'at least 0')
    expect(bad('DROPOUT=1.5'), 'DROPOUT=1.5', 'below 1')
    expect(bad('FREEZE=all'), 'FREEZE=all', "'backbone'")
    expect(bad('AMP=int8'), 'AMP=int8', "'bf16'")
    expect(bad('DEVICES=99'), 'DEVICES=[99]', 'DEVICES=[]')
    expect(bad('models/x.pth'), 'models/x.pth: only KEY=VALUE')


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


def test_results_that_cannot_be_kept(bad, monkeypatch):
    """Said before anything is scored."""
    monkeypatch.setattr(eval, 'score', None)
    torch.save({'net': baselines.build_network().state_dict(), 'step': 1},
               'a.pth')
    given = 'a.pth', 'STRIDE=16', 'NUM_WORKERS=0'
    with open('results.csv', 'w') as file:
        file.write('mIoU;seconds\n0.8;12\n')
    expect(bad(*given, main=eval.main), 'results.csv has other columns',
           'move it away')
    os.remove('results.csv')
    os.mkdir('results.csv')
    expect(bad(*given, main=eval.main), 'results.csv cannot be written',
           status=1)


def test_submission(bad, monkeypatch):
    """Pictures are looked for before the first is segmented; an archive that
    is there stays where a new one would not be whole."""
    torch.save({'net': baselines.build_network().state_dict(), 'step': 1},
               'a.pth')
    shutil.rmtree(bad.root / 'SegmentationClassAug')
    given = '--submit', 'a.pth', 'STRIDE=16', 'NUM_WORKERS=0'
    expect(bad(*given, 'VAL_SPLIT=test', main=eval.main), 'test.txt',
           'train, val')
    ids = (bad.root / 'ImageSets/Segmentation/val.txt').read_text().split()
    picture = bad.root / 'JPEGImages' / f'{ids[1]}.jpg'
    kept = picture.read_bytes()
    picture.unlink()
    expect(bad(*given, main=eval.main), picture, 'is not there')
    picture.write_bytes(b'no picture')
    expect(bad(*given, main=eval.main), picture, 'cannot be read')
    assert not os.path.exists('results')
    picture.write_bytes(kept)
    with open('results.tgz', 'w') as file:
        file.write('old')

    inner, palette = utils.save_label, utils.voc_palette()
    for name, spoil, told in (
            ('gone', os.remove, 'cannot be read (FileNotFoundError)'),
            ('torn', lambda path: os.truncate(path, 60), 'cannot be read'),
            ('small', lambda path: inner(np.zeros((9, 7), np.uint8), path,
                                         palette), 'has 7 x 9 pixels'),
            ('grey', lambda path: Image.new('L', (9, 9)).save(path),
             'has not the VOC palette'),
            ('class', lambda path: inner(np.full(dataset.image_size(
                picture), 6, np.uint8), path, palette), 'has the class 6')):
        def spoilt(label, path, colours):
            inner(label, path, colours)
            if path.endswith(f'{ids[1]}.png'):
                spoil(path)
        monkeypatch.setattr(utils, 'save_label', spoilt)
        expect(bad(*given, main=eval.main), f'{ids[1]}.png {told}',
               'was not written')
        with open('results.tgz') as file:
            assert file.read() == 'old', name
    assert not os.path.exists('results.tgz.tmp')


def test_prediction(bad, capsys):
    expect(bad('no.jpg', main=predict.main), 'no.jpg is not there')
    twin = bad.root / bad.image.name
    shutil.copy(bad.image, twin)
    expect(bad(bad.image, twin, main=predict.main), 'would both be written')
    expect(bad('a.pth', main=predict.main), '0 pictures and 1 checkpoints')
    expect(bad(bad.image, main=predict.main), 'models/final.pth')


def test_a_picture_that_bursts_the_memory(bad, monkeypatch):
    """Pillow refuses a header of more pixels than anything honest has."""
    torch.save({'net': baselines.build_network().state_dict(), 'step': 1},
               'a.pth')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40)
    expect(bad(bad.image, 'a.pth', 'STRIDE=16', main=predict.main),
           bad.image, 'cannot be read as a picture', status=1)


def test_folders_that_cannot_be_written(bad):
    with open('file', 'w'):
        pass
    for name in ('MODEL_DIR', 'LOG_DIR'):
        expect(bad(f'{name}=file/inside'), f'{name}=file/inside', status=1)


def test_the_old_checkpoint_survives_a_failed_save(bad, monkeypatch):
    utils.save({'step': 1}, 'models/latest.pth')

    def full(state, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise RuntimeError('unexpected pos 4 vs 8')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='models/latest.pth cannot be written'):
        utils.save({'step': 2}, 'models/latest.pth')
    assert utils.load('models/latest.pth') == {'step': 1}
    assert os.listdir('models') == ['latest.pth']
