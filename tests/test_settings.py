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
from project import EDITED

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
           'ITER_SAVE', 'ITER_VAL', 'CACHE', 'RECOMPUTE', 'EVAL_BATCH',
           'WANDB']


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
    if name in EDITED:
        pytest.skip('settings.py was edited')
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
    ('BATCH_SIZE=8', 8), ('BATCH_SIZE= 8 ', 8), ('BATCH_SIZE=1_000', 1000),
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
    ('DEVICES=all', 'list of int'), ('LR=' + '(' * 300, 'float'),
    ('LR=1' + '0' * 400, 'float'), ('LR=' + '9' * 5000, 'float')])
def test_override_refuses_another_type(word, kind):
    before, name = settings.as_dict(), word.split('=')[0]
    refused([word], f'{word}: {name} takes a value of type {kind}')
    assert same(settings.as_dict(), before) and not settings.given()


@pytest.mark.parametrize('word, example', [
    ('BATCH_SIZE=8.0', 'BATCH_SIZE=8'), ('EVAL_FLIP=yes', 'EVAL_FLIP=True'),
    ('LR=x', 'LR=0.5'), ('SCALES=x', 'SCALES=0.5,0.75,1.0'),
    ('N_LAYERS=x', 'N_LAYERS=18'), ('CROP_SIZE=x', 'CROP_SIZE=64'),
    ('DEVICES=all', 'DEVICES=0,1')])
def test_the_example_can_be_typed(word, example):
    with pytest.raises(settings.SettingError, match=f'such as {example}$'):
        settings.override([word])
    settings.override([example])


@pytest.mark.parametrize('word, hint', [
    ('CROPSIZE=1', 'the nearest is CROP_SIZE'), ('lr=1', 'the nearest is LR'),
    ('em_base=3', 'the nearest is EM_BASES'),
    ('N_CLASS=3', 'the nearest is N_CLASSES'),
    ('_given=1', '--help lists them'), ('override=1', '--help lists them'),
    ('FOO=1', '--help lists them')])
def test_override_names_the_nearest_where_one_is_near(word, hint):
    name = word.split('=')[0]
    refused([word], f'{word}: there is no setting {name}; {hint}')


@pytest.mark.parametrize('words, example', [
    (['--lr', '0.1'], 'LR=0.009'), (['--lr=0.1'], 'LR=0.009'),
    (['-LR=3'], 'LR=0.009'), (['LR', '=', '0.1'], 'LR=0.009'),
    (['LR = 0.1'], 'LR=0.009'), (['--batch-size', '4'], 'BATCH_SIZE=16')])
def test_a_setting_in_another_form_is_told_of(words, example):
    settings.LR, settings.BATCH_SIZE = 0.009, 16
    refused(words, f'{words[0]}: a setting is written KEY=VALUE, without '
                   f'blanks: {example}')


@pytest.mark.parametrize('word, old, new', [
    ('OHEM_LEAST=0.1', 'OHEM_LEAST', 'OHEM_MIN_KEPT'),
    ('CLASS_WEIGHTS=auto', 'CLASS_WEIGHTS=auto', 'BALANCE_CLASSES=True')])
def test_override_names_what_was_renamed(word, old, new):
    refused([word], f'{word}: {old} is now {new}')
    assert new.split('=')[0] in settings.as_dict()
    settings.override(['CLASS_WEIGHTS=1,0.5'])       # is still a setting
    assert settings.CLASS_WEIGHTS == (1.0, 0.5)


def test_override_returns_other_words_in_order():
    rest = ['b.pth', '--submit', '--to=x', 'a', '=1', 'my file=1', './a=b',
            'head', '-h']
    assert settings.override(rest[:4] + ['LR=1'] + rest[4:]) == rest
    assert settings.LR == 1


def test_override_all_allows_no_other_words():
    settings.override_all(['LR=1'])
    assert settings.LR == 1
    for word, told in (('a.pth', 'a.pth'), ('', 'an empty word')):
        refused(['LR=1', word, 'b'], f'{told}: only KEY=VALUE words',
                settings.override_all)


# ------------------------------------------------- validate
def invalid(name, value, *parts, for_training=False):
    """validate() refuses a value in one line that begins with its name."""
    settings.validate(for_training)                  # without it, it is valid
    vars(settings)[name] = value
    with pytest.raises(settings.SettingError) as error:
        settings.validate(for_training)
    text = str(error.value).removeprefix('settings.py: ')
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
        item = kind.__args__[0] if hasattr(kind, '__args__') else kind
        assert (item in (int, float)) == isinstance(allowed, str) or (
            isinstance(allowed, tuple)), name   # every number has a range


@pytest.mark.parametrize('name', [
    name for name, (_, allowed, _) in settings._TABLE.items()
    if isinstance(allowed, tuple)])
def test_a_choice_is_refused_with_the_choices(name):
    wanted = ', '.join(map(repr, settings.choices(name)))
    for value in settings.choices(name):
        vars(settings).update({name: value, 'BACKBONE': 'of timm'})
        settings.validate()
    other = 'other' if settings._TABLE[name][0] is str else 1
    invalid(name, other, f'{name}={other}: it can be {wanted}')


@pytest.mark.parametrize('name, good, bad, wanted', [
    ('CROP_SIZE', [1, 8193], [0, 10 ** 23, -3], '1 to 8,193'),
    ('N_CLASSES', [2, 256], [1, 257], '2 to 256'),
    ('DROPOUT', [0.0, 0.99], [-0.1, 1.0], '0 to 0.99'),
    ('EM_MOM', [0.0, 1.0], [-0.1, 1.1], '0 to 1'),
    ('OHEM_THRESHOLD', [0.1, 1.0], [0.0, 1.1], '0.0001 to 1'),
    ('LR', [0.0, 1e6], [-1e-9, float('nan'), float('inf')],
     '0 to 1,000,000'),
    ('SCALES', [(0.1,), (1.0, 9.0)], [(1e-9,), (1.0, -1.0)], '0.05 to 16'),
    ('EVAL_SCALES', [(0.05, 16.0)], [(1e300,), (float('nan'),)],
     '0.05 to 16'),
    ('MEAN', [(0.0, 0.5, 1.0)], [(123.7, 116.3, 103.5)], '0 to 1'),
    ('STD', [(1.0, 1.0, 1.0)], [(0.0, 1.0, 1.0)], '0.001 to 1'),
    ('SEED', [0, 2 ** 32 - 1], [-1, 10 ** 23], '0 to 4,294,967,295'),
    ('ITER_MAX', [1, 10 ** 8], [0, 10 ** 20], '1 to 100,000,000'),
    ('EM_BASES', [1, 8192], [0, 10 ** 12], '1 to 8,192'),
    ('STAGE_NUM_EVAL', [0, 1000], [-1, 10 ** 20], '0 to 1,000'),
    ('DEVICES', [[], [-1, -1]], [[-2], [10 ** 9]], '-1 to 1,023'),
    ('EVAL_CLASSES', [(), (0, 20)], [(-1,), (0, 256)], '0 to 255')])
def test_a_range_is_refused_with_its_bounds(name, good, bad, wanted):
    for value in good:
        vars(settings)[name] = value
        settings.validate()
    for value in bad:
        vars(settings)[name] = good[0]
        invalid(name, value, f'{name}={value}: it can be {wanted}')


@pytest.mark.parametrize('name, value, parts', [
    ('EVAL_CLASSES', (1, 21), ['=(1, 21): classes are 0 to 20']),
    ('EVAL_CLASSES', (1, 2, 1), ['each once']),
    ('SCALES', (), ['=(): it cannot be empty']),
    ('EVAL_SCALES', (), ['=(): it cannot be empty']),
    ('MODEL_DIR', '', ['=: it cannot be empty']),
    ('LOG_DIR', '', ['empty']), ('DATA_ROOT', '', ['empty']),
    ('MEAN', (0.5,), ['=(0.5,): it is of R, G and B']),
    ('STD', (1.0,) * 4, ['R, G and B']),
    ('WANDB', 'a b', ['=a b: it is PROJECT or ENTITY/PROJECT']),
    ('WANDB', 'a/b/c', ['ENTITY/PROJECT']), ('WANDB', 'ä', ['letters'])])
def test_rules_between_settings(name, value, parts):
    invalid(name, value, *parts)


@pytest.mark.parametrize('others, name, value, parts', [
    ({}, 'CLASS_WEIGHTS', (1.0, 2.0), ['=(1.0, 2.0)', '21 numbers']),
    ({}, 'CLASS_WEIGHTS', (0.0,) * 21, ['not all 0']),
    ({'STRIDE': 32}, 'CROP_SIZE', 64, ['=64 with STRIDE=32: at least 65']),
    ({'STRIDE': 8}, 'CROP_SIZE', 1, ['=1 with STRIDE=8: at least 17']),
    ({'BALANCE_CLASSES': True}, 'CLASS_WEIGHTS', (1.0,) * 21,
     ['BALANCE_CLASSES=True']),
    ({'BATCH_SIZE': 1}, 'HEAD', 'deeplabv3', ['BATCH_SIZE=1', 'ACCUM=1']),
    ({'BATCH_SIZE': 3, 'ACCUM': 2}, 'HEAD', 'deeplabv3plus', ['ACCUM=2'])])
def test_rules_of_training(others, name, value, parts):
    vars(settings).update(others)
    invalid(name, value, *parts, for_training=True)
    settings.validate()                              # they bind nothing else


def test_class_weights_of_every_class_are_valid():
    settings.CLASS_WEIGHTS = (0.0,) * 20 + (1.0,)
    settings.validate(for_training=True)


def test_describe_is_the_sections_of_the_file():
    """With the values of now, the comments, and the ranges they leave out."""
    if EDITED:
        pytest.skip('settings.py was edited')
    settings.LR, settings.STRIDE = 0.5, 8
    settings.SEED = 7
    first, *lines = settings.describe().splitlines()
    assert 'KEY=VALUE' in first and all(len(line) < 80 for line in lines)
    assert [line for line in lines if line.endswith(':') and line[0] != ' '
            ] == ['data:', 'network:', 'EMA unit:', 'training:',
                  'evaluation:', 'machine:']
    assert [line.split()[0] for line in lines if line[:2] == '  '
            and line[2] != ' '] == list(settings.as_dict())
    text = ' '.join(' '.join(lines).split())
    for part in ('STRIDE = 8 output stride of the backbone: 8, 16, 32; 14 is '
                 'of vision transformers DROP',
                 'LR = 0.5 learning rate at the start; of biases twice that '
                 '(0 to 1,000,000) OPTIMIZER',
                 "alone ('cross_entropy', 'ohem') OHEM_THRESHOLD",
                 'as trainval and val do N_CLASSES',
                 'SEED = 7 of weights, order and augmentation (0 to '
                 '4,294,967,295)'):
        assert part in text


# ------------------------------------------------- the file edited by hand
@pytest.mark.parametrize('line, told', [
    ("LR = '0.01'", "LR='0.01': LR takes a value of type float, such as "
                    "LR = 0.01"),
    ('EVAL_SCALES = (1.0)', 'EVAL_SCALES=1.0: EVAL_SCALES takes a value of '
                            'type tuple of float, such as EVAL_SCALES = '
                            '(1.0,)'),
    ('DEVICES = -1', 'DEVICES=-1: DEVICES takes a value of type list of int, '
                     'such as DEVICES = [-1]'),
    ('CROP_SIZE = 513.0', 'CROP_SIZE=513.0: CROP_SIZE takes a value of type '
                          'int, such as CROP_SIZE = 513'),
    ('BATCH_SIZE = True', 'BATCH_SIZE=True: BATCH_SIZE takes a value of type '
                          'int, such as BATCH_SIZE = 64'),
    ('EVAL_FLIP = 1', 'EVAL_FLIP=1: EVAL_FLIP takes a value of type bool, '
                      'such as EVAL_FLIP = True'),
    ("SCALES = ('1',)", "SCALES=('1',): SCALES takes a value of type tuple "
                        "of float, such as SCALES = (0.5, 0.75, 1.0)"),
    ('DATA_ROOT = None', "DATA_ROOT=None: DATA_ROOT takes a value of type "
                         "str, such as DATA_ROOT = 'name'"),
    ('N_LAYERS = [50]', 'N_LAYERS=[50]: N_LAYERS takes a value of type int, '
                        'such as N_LAYERS = 18'),
    ('EVAL_CLASSES = 0', 'EVAL_CLASSES=0: EVAL_CLASSES takes a value of type '
                         'tuple of int, such as EVAL_CLASSES = (0,)'),
    ('LR = -1', 'LR=-1.0: it can be 0 to 1,000,000'),
    ("HEAD = 'emma'", "HEAD=emma: it can be 'ema', "),
    ('BATCHSIZE = 4', 'BATCHSIZE is no setting; the nearest is BATCH_SIZE'),
    ('batch_size = 4', 'batch_size is no setting; the nearest is BATCH_SIZE'),
    ('OHEM_LEAST = 0.1', 'OHEM_LEAST is no setting; it is now OHEM_MIN_KEPT'),
    ('FOO = 1', 'FOO is no setting; a new one needs a row in _TABLE'),
    ('del BATCH_SIZE', 'BATCH_SIZE is missing; add a value of type int, such '
                       'as BATCH_SIZE = 64')])
def test_the_file_is_checked(edited, line, told):
    edited(line)
    for function in (lambda: settings.override([]), settings.validate):
        with pytest.raises(settings.SettingError) as error:
            function()
        assert str(error.value).startswith(f'settings.py: {told}')
    settings.describe()                              # --help still works


def test_ints_and_lists_pass_for_floats_and_tuples(edited):
    edited('LR, SCALES, DEVICES, MEAN = 1, [1, 0.5], (0, 1), [0, 0.5, 1]')
    settings.validate()
    assert same([settings.LR, settings.SCALES, settings.DEVICES,
                 settings.MEAN],
                [1.0, (1.0, 0.5), [0, 1], (0.0, 0.5, 1.0)])


@pytest.fixture
def edited():
    """Run a line in settings.py; take it back after the test."""
    before = dict(vars(settings))
    yield lambda line: exec(line, vars(settings))
    vars(settings).clear()
    vars(settings).update(before)


# ------------------------------------------------- checkpoints
def test_adopt_command_line_then_checkpoint_then_file():
    settings.override(['EM_BASES=8'])
    changed = settings.adopt({
        'EM_BASES': 16, 'EM_CHANNELS': 256, 'MEAN': (0.5, 0.5, 0.5)})
    assert changed == {'EM_CHANNELS': 256, 'MEAN': (0.5, 0.5, 0.5)}
    assert settings.EM_BASES == 8                   # from the command line
    assert settings.EM_CHANNELS == 256              # from the checkpoint
    assert settings.STAGE_NUM == 3                  # from the file


OTHER_NETWORK = {
    'N_CLASSES': 3, 'MEAN': (0.5, 0.5, 0.5), 'STD': (0.5, 0.5, 0.5),
    'HEAD': 'fcn', 'BACKBONE': 'vgg11', 'N_LAYERS': 18, 'STEM': 'plain',
    'STRIDE': 16,
    'DROPOUT': 0.5, 'BN_MOM': 0.5, 'EM_CHANNELS': 8, 'EM_BASES': 8,
    'STAGE_NUM': 1, 'STAGE_NUM_EVAL': 1, 'EM_KEEP': 'fixed', 'EM_MOM': 0.5,
    'EM_NORM': 'none', 'EM_GRAD': True, 'CROP_SIZE': 65}


def test_adopt_takes_the_network_alone():
    """Everything a checkpoint could differ in: only the network's is taken,
    or what is named."""
    before = settings.as_dict()
    recorded = {**dict.fromkeys([*before, 'GONE'], 'other'), **OTHER_NETWORK}
    assert settings.adopt(recorded) == OTHER_NETWORK
    assert settings.as_dict() == {**before, **OTHER_NETWORK}
    assert settings.network_settings() == OTHER_NETWORK
    assert settings.adopt(recorded, ['DATA_ROOT']) == {'DATA_ROOT': 'other'}
    settings.override(['VAL_SPLIT=mine'])
    assert settings.adopt(recorded, ['VAL_SPLIT']) == {}


@pytest.mark.parametrize('name, value, told', [
    ('N_CLASSES', 'x', 'N_CLASSES takes a value of type int'),
    ('N_CLASSES', 1, 'it can be 2 to 256'), ('HEAD', 5, 'type str'),
    ('MEAN', 0.5, 'type tuple of float'), ('EM_MOM', None, 'type float')])
def test_adopt_refuses_what_cannot_be(name, value, told):
    before = settings.as_dict()
    with pytest.raises(settings.SettingError) as error:
        settings.adopt({'STAGE_NUM': 7, name: value})
    text = str(error.value)
    assert text.startswith(f'in the checkpoint, {name}={value!r}: ')
    assert told in text and settings.as_dict() == before


def test_adopt_takes_lists_for_tuples():
    assert same(settings.adopt({'MEAN': [0, 1, 0.5]}),
                {'MEAN': (0.0, 1.0, 0.5)})


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
