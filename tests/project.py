"""The project as it is shipped: its settings, and copies of its folder.

An experiment's settings.py is edited. So that the tests hold there too, they
run with the values below: in their own process, and in the scripts that they
start, which are then those of a copy of the project.
"""
import ast
import glob
import os
import shutil

import settings
import utils

SETTINGS = {
    'DATA_ROOT': 'data/voc', 'TRAIN_SPLIT': 'trainaug', 'VAL_SPLIT': 'val',
    'ALLOW_OVERLAP': False, 'N_CLASSES': 21, 'IGNORE_LABEL': 255,
    'MEAN': (0.485, 0.456, 0.406), 'STD': (0.229, 0.224, 0.225),
    'SCALES': (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
    'COLOR_JITTER': 0.0, 'CROP_SIZE': 513,
    'NUM_WORKERS': 4, 'CACHE': False,
    'HEAD': 'ema', 'BACKBONE': '', 'N_LAYERS': 101, 'STEM': 'deep',
    'STRIDE': 8,
    'DROPOUT': 0.1, 'BN_MOM': 3e-4, 'PRETRAINED': 'auto',
    'PRETRAINED_PARTIAL': False, 'INIT_FROM': '',
    'EM_CHANNELS': 512, 'EM_BASES': 64, 'STAGE_NUM': 3, 'STAGE_NUM_EVAL': 0,
    'EM_KEEP': 'moving_avg', 'EM_MOM': 0.9, 'EM_NORM': 'l2',
    'EM_GRAD': False, 'EM_ZERO_INIT': False,
    'BATCH_SIZE': 16, 'ACCUM': 1, 'ITER_MAX': 30000, 'LR': 9e-3,
    'OPTIMIZER': 'sgd', 'LR_MOM': 0.9, 'SCHEDULE': 'poly',
    'LR_DECAY': 10, 'POLY_POWER': 0.9, 'WARMUP': 0, 'BACKBONE_LR': 1.0,
    'CLIP_GRAD': 0.0, 'WEIGHT_DECAY': 1e-4, 'LABEL_SMOOTHING': 0.0,
    'LOSS': 'cross_entropy', 'OHEM_THRESHOLD': 0.7, 'OHEM_MIN_KEPT': 0.0625,
    'CLASS_WEIGHTS': (), 'BALANCE_CLASSES': False, 'FREEZE': '',
    'AVERAGE': 0.0, 'AMP': 'auto', 'COMPILE': False, 'RECOMPUTE': False,
    'SEED': 66, 'DETERMINISTIC': False,
    'ITER_VAL': 2000, 'EVAL_SCALES': (1.0,), 'EVAL_FLIP': False,
    'EVAL_WINDOW': 0, 'INFERENCE': 'folded', 'EVAL_BATCH': 0,
    'EVAL_CLASSES': (),
    'DEVICES': [], 'ITER_SAVE': 2000, 'MODEL_DIR': 'models',
    'LOG_DIR': 'logdir', 'WANDB': ''}
EDITED = [name for name, value in SETTINGS.items()
          if repr(vars(settings).get(name)) != repr(value)]
PARTS = ('*.py', '*.sh', '*.txt', '*.md', '*.toml', '*.ini', 'LICENSE',
         '.gitignore', '.ci', '.github', 'classes', 'converters', 'docs',
         'lib', 'lists', 'recipes', 'tests', 'tools', 'models/README.md')


def copy_project(to):
    """Copy the project to a new folder, as a fresh clone has it; return it.
    """
    os.makedirs(os.path.join(to, 'models'))
    for part in PARTS:
        for name in glob.glob(part, root_dir=utils.ROOT):
            path = os.path.join(utils.ROOT, name)
            copy = os.path.join(to, name)
            if name == 'forked_from.txt':
                continue
            if os.path.isdir(path):
                shutil.copytree(path, copy, ignore=shutil.ignore_patterns(
                    '__pycache__'))
            else:
                shutil.copy(path, copy)
    edit_settings(os.path.join(to, 'settings.py'),
                  {name: SETTINGS[name] for name in EDITED})
    return to


def edit_settings(path, values):
    """Give settings in a settings.py other values; all else stays."""
    with open(path, 'rb') as file:              # ast counts bytes
        source = file.read()
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        name = getattr(target, 'id', '')
        if name in values:
            old = node.value
            lines[old.lineno - 1:old.end_lineno] = [
                lines[old.lineno - 1][:old.col_offset]
                + repr(values[name]).encode()
                + lines[old.end_lineno - 1][old.end_col_offset:]]
    with open(path, 'wb') as file:
        file.writelines(lines)
