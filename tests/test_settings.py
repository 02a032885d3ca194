"""Do settings take what is meant, and refuse the rest by name?

    python -m pytest tests/test_settings.py

The paper's values are copied here by hand; the rest are properties of the
file itself, read as text.
"""
import ast
import glob
import os
import re

import pytest
import torch

import settings
from conftest import REPO

PAPER = {
    'MEAN': (0.485, 0.456, 0.406), 'STD': (0.229, 0.224, 0.225),
    'SCALES': (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0), 'CROP_SIZE': 513,
    'N_CLASSES': 21, 'IGNORE_LABEL': 255, 'TRAIN_SPLIT': 'trainaug',
    'VAL_SPLIT': 'val', 'HEAD': 'ema', 'N_LAYERS': 101, 'STEM': 'deep',
    'STRIDE': 8, 'DROPOUT': 0.1, 'BN_MOM': 3e-4, 'EM_CHANNELS': 512,
    'EM_BASES': 64, 'STAGE_NUM': 3, 'STAGE_NUM_EVAL': 0,
    'EM_KEEP': 'moving_avg', 'EM_MOM': 0.9, 'EM_NORM': 'l2',
    'EM_GRAD': False, 'BATCH_SIZE': 16, 'ITER_MAX': 30000, 'LR': 9e-3,
    'LR_MOM': 0.9, 'LR_DECAY': 10, 'POLY_POWER': 0.9, 'WEIGHT_DECAY': 1e-4,
    'SEED': 66, 'EVAL_SCALES': (1.0,), 'EVAL_FLIP': False, 'DEVICES': []}
MACHINE = ['DATA_ROOT', 'DEVICES', 'NUM_WORKERS', 'LOG_DIR', 'MODEL_DIR',
           'ITER_SAVE', 'CACHE', 'RECOMPUTE', 'EVAL_BATCH']


def same(a, b):
    """Equal in value and in type, inside as well."""
    return repr(a) == repr(b)


def refused(words, start, function=settings.override):
    """The function refuses words in one line that begins so."""
    with pytest.raises(settings.SettingError) as error:
        function(words)
    text = str(error.value)
    assert text.startswith(start) and '\n' not in text


def source():
    with open(os.path.join(REPO, 'settings.py')) as file:
        return ast.parse(file.read())


# ------------------------------------------------- the file
@pytest.mark.parametrize('name', PAPER)
def test_default_is_the_papers(name):
    assert same(getattr(settings, name), PAPER[name])


def test_imports_nothing():
    assert not [node for node in source().body
                if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_as_dict_is_the_literals_of_the_file():
    literals = {node.targets[0].id: ast.literal_eval(node.value)
                for node in source().body if isinstance(node, ast.Assign)
                and node.targets[0].id.isupper()
                and not node.targets[0].id.startswith('_')}
    assert len(literals) > 40 and same(settings.as_dict(), literals)


def test_as_dict_is_plain(tmp_path):
    values = settings.as_dict()
    for value in values.values():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            assert type(each) in (int, float, bool, str)
    torch.save(values, tmp_path / 'x.pth')
    assert same(torch.load(tmp_path / 'x.pth', weights_only=True), values)


def test_every_setting_is_read():
    text = ''
    for folder in ('', 'lib', 'converters', 'tools'):
        for path in glob.glob(os.path.join(REPO, folder, '*.py')):
            if os.path.basename(path) != 'settings.py':
                with open(path) as file:
                    text += file.read()
    unread = [name for name in settings.as_dict()
              if not re.search(rf'\b(settings|s)\.{name}\b', text)]
    assert not unread


# ------------------------------------------------- override
@pytest.mark.parametrize('word, value', [
    ('BATCH_SIZE=8', 8), ('BATCH_SIZE=-1', -1), ('BATCH_SIZE= 8 ', 8),
    ('LR=0.1', 0.1), ('LR=1e-3', 1e-3), ('LR=1', 1.0),
    ('EVAL_FLIP=True', True), ('EM_GRAD=False', False),
    ('DATA_ROOT=/my data/a=b', '/my data/a=b'), ('PRETRAINED=', ''),
    ('DATA_ROOT= a ', ' a '),
    ('TRAIN_SPLIT=7', '7'), ('SCALES=(0.5, 1)', (0.5, 1.0)),
    ('SCALES=0.5,2', (0.5, 2.0)), ('SCALES=[1]', (1.0,)),
    ('EVAL_SCALES=2', (2.0,)), ('EVAL_CLASSES=0,8', (0, 8)),
    ('EVAL_CLASSES=()', ()), ('DEVICES=3', [3]), ('DEVICES=0,1', [0, 1]),
    ('DEVICES=(0, 1)', [0, 1]), ('DEVICES=[]', []),
    ('CLASS_WEIGHTS=()', ()), ('CLASS_WEIGHTS=2', (2.0,))])
def test_override_takes(word, value):
    assert settings.override([word]) == []
    name = word.split('=')[0]
    assert same(getattr(settings, name), value)
    assert same(settings.given(), {name: value})


def test_override_takes_back_what_it_prints():
    before = settings.as_dict()
    settings.override([f'{name}={value}' for name, value in before.items()])
    assert same(settings.as_dict(), before)
    assert list(settings.given()) == sorted(before)


@pytest.mark.parametrize('word, kind', [
    ('BATCH_SIZE=8.0', 'int'), ('BATCH_SIZE=True', 'int'),
    ('BATCH_SIZE=many', 'int'), ('BATCH_SIZE=', 'int'),
    ('BATCH_SIZE=1,2', 'int'), ("BATCH_SIZE='8'", 'int'),
    ('BATCH_SIZE=int(8)', 'int'), ('BATCH_SIZE=8)', 'int'),
    ('LR=fast', 'float'), ('LR=True', 'float'), ('LR=None', 'float'),
    ('EVAL_FLIP=1', 'bool'), ('EVAL_FLIP=true', 'bool'),
    ('SCALES=0.5,x', 'tuple'), ('SCALES=1.0,True', 'tuple of float'),
    ("SCALES='12'", 'tuple of float'), ('EVAL_CLASSES=0.5', 'tuple of int'),
    ('CLASS_WEIGHTS=', 'tuple of float'), ('DEVICES=0.5', 'list of int'),
    ('DEVICES=all', 'list of int')])
def test_override_refuses_another_type(word, kind):
    before, name = settings.as_dict(), word.split('=')[0]
    refused([word], f'{word}: {name} takes a value of type {kind}')
    assert same(settings.as_dict(), before) and not settings.given()


@pytest.mark.parametrize('word, nearest', [
    ('CROPSIZE=1', 'CROP_SIZE'), ('lr=1', 'LR'), ('em_base=3', 'EM_BASES'),
    ('N_CLASS=3', 'N_CLASSES'), ('_given=1', ''), ('override=1', '')])
def test_override_names_the_nearest(word, nearest):
    name = word.split('=')[0]
    refused([word], f'{word}: there is no setting {name}; '
                    f'the nearest is {nearest}')


@pytest.mark.parametrize('word, old, new', [
    ('OHEM_LEAST=0.1', 'OHEM_LEAST', 'OHEM_MIN_KEPT'),
    ('CLASS_WEIGHTS=auto', 'CLASS_WEIGHTS=auto', 'BALANCE_CLASSES=True')])
def test_override_names_what_was_renamed(word, old, new):
    refused([word], f'{word}: {old} is now {new}')
    assert new.split('=')[0] in settings.as_dict()
    settings.override(['CLASS_WEIGHTS=1,0.5'])       # is still a setting
    assert settings.CLASS_WEIGHTS == (1.0, 0.5)


def test_override_returns_other_words_in_order():
    rest = ['b.pth', '--submit', '--to=x', 'a', '=1', 'my file=1', './a=b']
    assert settings.override(rest[:4] + ['LR=1'] + rest[4:]) == rest
    assert settings.LR == 1


def test_override_all_allows_no_other_words():
    settings.override_all(['LR=1'])
    assert settings.LR == 1
    refused(['LR=1', 'a.pth', 'b'], 'a.pth: only KEY=VALUE words',
            settings.override_all)


# ------------------------------------------------- validate
def invalid(name, value, *parts, for_training=False):
    """validate() refuses a value in one line that begins with its name."""
    settings.validate(for_training)                  # without it, it is valid
    vars(settings)[name] = value
    with pytest.raises(settings.SettingError) as error:
        settings.validate(for_training)
    text = str(error.value)
    assert text.startswith(name) and '\n' not in text
    for part in parts:
        assert part in text


def test_every_setting_is_in_the_table_and_its_default_valid():
    assert list(settings._TABLE) == list(settings.as_dict())
    settings.validate(for_training=True)
    for name, (kind, allowed, about) in settings._TABLE.items():
        value = getattr(settings, name)
        assert type(value) is getattr(kind, '__origin__', kind), name
        for each in value if isinstance(value, (list, tuple)) else ():
            assert type(each) is kind.__args__[0], name
        assert about in ('network', 'machine', 'run'), name
        assert allowed is None or isinstance(allowed, tuple) or re.fullmatch(
            r'[\[(]\d+, (\d+|inf)[\])]', allowed), name


@pytest.mark.parametrize('name', [
    name for name, (_, allowed, _) in settings._TABLE.items()
    if isinstance(allowed, tuple)])
def test_a_choice_is_refused_with_the_choices(name):
    wanted = ', '.join(map(repr, settings.choices(name)))
    for value in settings.choices(name):
        vars(settings)[name] = value
        settings.validate()
    invalid(name, 'other', f'{name}=other: it can be {wanted}')


@pytest.mark.parametrize('name, good, bad, wanted', [
    ('CROP_SIZE', [1, 10 ** 6], [0, -3], 'at least 1'),
    ('N_CLASSES', [2, 256], [1, 257], 'at least 2 and at most 256'),
    ('DROPOUT', [0.0, 0.99], [-0.1, 1.0], 'at least 0 and below 1'),
    ('EM_MOM', [0.0, 1.0], [-0.1, 1.1], 'at least 0 and at most 1'),
    ('OHEM_THRESHOLD', [0.1, 1.0], [0.0, 1.1], 'above 0 and at most 1'),
    ('LR', [0.0, 1e9], [-1e-9, float('nan')], 'at least 0'),
    ('SCALES', [(0.1,), (1.0, 9.0)], [(0.0,), (1.0, -1.0)], 'above 0'),
    ('EVAL_CLASSES', [(), (0, 20)], [(-1,), (0, 256)],
     'at least 0 and at most 255')])
def test_a_range_is_refused_with_its_bounds(name, good, bad, wanted):
    for value in good:
        vars(settings)[name] = value
        settings.validate()
    for value in bad:
        vars(settings)[name] = good[0]
        invalid(name, value, f'{name}={value}: it can be {wanted}')


@pytest.mark.parametrize('name, value, parts', [
    ('EVAL_CLASSES', (1, 21), ['=(1, 21): classes are 0 to 20']),
    ('SCALES', (), ['=(): name at least one']),
    ('EVAL_SCALES', (), ['=(): name at least one']),
    ('MEAN', (0.5,), ['=(0.5,): it is of R, G and B']),
    ('STD', (1.0,) * 4, ['R, G and B'])])
def test_rules_between_settings(name, value, parts):
    invalid(name, value, *parts)


@pytest.mark.parametrize('others, name, value, parts', [
    ({}, 'CLASS_WEIGHTS', (1.0, 2.0), ['=(1.0, 2.0)', '21 numbers']),
    ({}, 'CLASS_WEIGHTS', (0.0,) * 21, ['not all 0']),
    ({'BALANCE_CLASSES': True}, 'CLASS_WEIGHTS', (1.0,) * 21,
     ['BALANCE_CLASSES=True']),
    ({'RECOMPUTE': True}, 'COMPILE', True, ['RECOMPUTE=True']),
    ({'BATCH_SIZE': 1}, 'HEAD', 'deeplabv3', ['BATCH_SIZE=1', 'ACCUM=1']),
    ({'BATCH_SIZE': 3, 'ACCUM': 2}, 'HEAD', 'deeplabv3plus', ['ACCUM=2'])])
def test_rules_of_training(others, name, value, parts):
    vars(settings).update(others)
    invalid(name, value, *parts, for_training=True)
    settings.validate()                              # they bind nothing else


def test_class_weights_of_every_class_are_valid():
    settings.CLASS_WEIGHTS = (0.0,) * 20 + (1.0,)
    settings.validate(for_training=True)


def test_describe_names_value_type_and_choices():
    first, *lines = settings.describe().splitlines()
    assert 'KEY=VALUE' in first
    assert [line.split()[0] for line in lines] == list(settings.as_dict())
    for line in ("  STRIDE = 8 (int: 8, 16, 32)",
                 "  STEM = 'deep' (str: 'deep', 'plain')",
                 '  OHEM_THRESHOLD = 0.7 (float: above 0 and at most 1)',
                 '  EVAL_SCALES = (1.0,) (tuple[float]: above 0)',
                 '  EVAL_FLIP = False (bool)', '  DEVICES = [] (list[int])'):
        assert line in lines
    settings.LR = 0.5
    assert '  LR = 0.5 (float: at least 0)' in settings.describe()


# ------------------------------------------------- checkpoints
def test_adopt_command_line_then_checkpoint_then_file():
    settings.override(['EM_BASES=8'])
    changed = settings.adopt({
        'EM_BASES': 16, 'EM_CHANNELS': 256, 'MEAN': (0.5, 0.5, 0.5)})
    assert changed == {'EM_CHANNELS': 256, 'MEAN': (0.5, 0.5, 0.5)}
    assert settings.EM_BASES == 8                   # from the command line
    assert settings.EM_CHANNELS == 256              # from the checkpoint
    assert settings.STAGE_NUM == 3                  # from the file


def test_adopt_takes_the_network_alone():
    """Everything a checkpoint could differ in: only the network's is taken."""
    before = settings.as_dict()
    changed = settings.adopt({name: 'other' for name in [*before, 'GONE']})
    assert set(changed) == {
        'N_CLASSES', 'MEAN', 'STD', 'HEAD', 'N_LAYERS', 'STEM', 'STRIDE',
        'DROPOUT', 'BN_MOM', 'EM_CHANNELS', 'EM_BASES', 'STAGE_NUM',
        'STAGE_NUM_EVAL', 'EM_KEEP', 'EM_MOM', 'EM_NORM', 'EM_GRAD',
        'CROP_SIZE'}
    assert settings.as_dict() == {**before, **changed}
    assert settings.network_settings() == changed


def test_adopt_says_nothing_of_equal_values():
    assert settings.adopt(settings.as_dict()) == {}


def test_changed_since():
    recorded = settings.as_dict()
    assert settings.changed_since(recorded) == {}
    for name in MACHINE:
        vars(settings)[name] = 'other'
    assert settings.changed_since(recorded) == {}
    settings.LR = 1.0
    assert settings.changed_since(recorded) == {'LR': (9e-3, 1.0)}


def test_changed_since_names_all_that_is_not_the_machines():
    recorded = settings.as_dict()
    changed = settings.changed_since({name: 'other' for name in recorded})
    assert changed == {name: ('other', value)
                       for name, value in recorded.items()
                       if name not in MACHINE}


def test_changed_since_names_what_came_and_went():
    recorded = settings.as_dict()
    del recorded['SEED']
    assert settings.changed_since({**recorded, 'GONE': 1}) == {
        'GONE': (1, None), 'SEED': (None, 66)}
