"""The settings of this experiment: edit this file, or give `KEY=VALUE` on the
command line for a smoke run or a sweep (`python train.py CROP_SIZE=129`).

The values are those of the paper's PASCAL VOC recipe, the names those of the
authors' 2019 code where it had one. The globals are literals, so that two
experiments are compared with `diff`; below them is what checks them.
"""

# ---------------------------------------------------------------- data
DATA_ROOT = 'data/voc'       # folder in the VOC layout; see docs/data.md
TRAIN_SPLIT = 'trainaug'     # a list in ImageSets/Segmentation
VAL_SPLIT = 'val'            # the list to validate and score on; '': none
ALLOW_OVERLAP = False        # True: these two may share images, as trainval
#                              and val do
N_CLASSES = 21               # classes, background included, void not
IGNORE_LABEL = 255           # label value of void pixels: no loss, no score
MEAN = (0.485, 0.456, 0.406)  # of R, G, B in 0..1, subtracted
STD = (0.229, 0.224, 0.225)  # of R, G, B in 0..1, divided by
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # training scales, one drawn
CROP_SIZE = 513              # side of the crop, pixels; k * STRIDE + 1
NUM_WORKERS = 4              # loader processes, for each training process
CACHE = False                # True: decode a small set once, into memory

# ---------------------------------------------------------------- network
HEAD = 'ema'                 # 'ema' (EMANet), 'nonlocal', 'fcn' (a classifier
#                              alone), 'deeplabv3', 'deeplabv3plus', 'psa'
N_LAYERS = 101               # of the ResNet: 18, 34, 50, 101, 152
STEM = 'deep'                # 'deep' (three 3x3), 'plain' (torchvision's 7x7)
STRIDE = 8                   # output stride of the backbone: 8, 16, 32
DROPOUT = 0.1                # of whole channels before the classifier
BN_MOM = 3e-4                # share of the running statistics replaced a step
PRETRAINED = 'auto'          # 'auto' (by N_LAYERS and STEM), a known name
#                              (docs/data.md lists them), a file, '': none
PRETRAINED_PARTIAL = False   # True: the file may lack layers; they are named
INIT_FROM = ''               # a checkpoint whose weights to start from, not
#                              its schedule; what does not fit is named

# ---------------------------------------------------------------- EMA unit
EM_CHANNELS = 512            # c, channels of the unit: 512, 256
EM_BASES = 64                # k, bases
STAGE_NUM = 3                # T, EM iterations
STAGE_NUM_EVAL = 0           # T in evaluation; 0: as STAGE_NUM
EM_KEEP = 'moving_avg'       # bases: 'moving_avg', 'learned', 'fixed'
EM_MOM = 0.9                 # share of the bases kept a step (moving_avg)
EM_NORM = 'l2'               # of the bases: 'l2', 'layer', 'none'
EM_GRAD = False              # True: gradient through the last iteration

# ---------------------------------------------------------------- training
BATCH_SIZE = 16              # images a step, over all processes
ACCUM = 1                    # micro-batches a step (gradient accumulation)
ITER_MAX = 30000             # steps
LR = 9e-3                    # learning rate at the start; of biases twice that
LR_MOM = 0.9                 # momentum of SGD
LR_DECAY = 10                # steps between changes of the learning rate
POLY_POWER = 0.9             # LR * (1 - step / ITER_MAX) ** POLY_POWER
WEIGHT_DECAY = 1e-4          # of convolution weights; of nothing else
LOSS = 'cross_entropy'       # or 'ohem', of an image's hard pixels alone
OHEM_THRESHOLD = 0.7         # hard: the label's class is less probable, or
OHEM_MIN_KEPT = 0.0625       # the pixel is of the hardest, this share of all
CLASS_WEIGHTS = ()           # of each class in the loss; (): equal
BALANCE_CLASSES = False      # True: weights from how rare a class is in
#                              TRAIN_SPLIT
FREEZE = ''                  # of the backbone: 'bn' (its statistics),
#                              'backbone' (its weights as well), '': nothing
AVERAGE = 0.0                # share kept by averaged weights a step; 0: none
AMP = 'auto'                 # 'auto' (bf16 on a GPU that has it), 'off',
#                              'bf16', 'fp16' (with a loss scaler)
COMPILE = False              # True: the backbone through torch.compile
RECOMPUTE = False            # True: activation checkpointing of the backbone:
#                              half the activations for a quarter more time
SEED = 66                    # of weights, order and augmentation
DETERMINISTIC = False        # True: bit-equal runs on a GPU too, but slower

# ---------------------------------------------------------------- evaluation
ITER_VAL = 2000              # validate every so many steps; 0: at the end only
EVAL_SCALES = (1.0,)         # probabilities are averaged over these scales
EVAL_FLIP = False            # True: and over the left-right flip
EVAL_WINDOW = 0              # side of the sliding window, pixels, for images
#                              larger than it; 0: whole images, but for huge
#                              ones (docs/evaluation.md)
INFERENCE = 'folded'         # 'folded' (batch norm in the convolutions),
#                              'plain' (the network as it is), 'bf16'
#                              (folded, and convolutions in bfloat16)
EVAL_BATCH = 0               # images of one size at once; 0: 8 on a GPU, or 1
EVAL_CLASSES = ()            # classes in the means, by number; (): all

# ---------------------------------------------------------------- machine
DEVICES = []                 # GPUs by number, a process each; -1: the CPU;
#                              []: all GPUs there are, else the CPU
ITER_SAVE = 2000             # step_N.pth; latest.pth ten times as often
MODEL_DIR = 'models'         # checkpoints
LOG_DIR = 'logdir'           # TensorBoard's events, log.csv, eval.json

# ------------------------------------------------- the table of settings
# name: (type, choices or range, what it is about). 'network': a checkpoint
# brings it along; 'machine': may change when a run is resumed; 'run': may not.
_TABLE = {
    'DATA_ROOT': (str, None, 'machine'),
    'TRAIN_SPLIT': (str, None, 'run'),
    'VAL_SPLIT': (str, None, 'run'),
    'ALLOW_OVERLAP': (bool, None, 'run'),
    'N_CLASSES': (int, '[2, 256]', 'network'),
    'IGNORE_LABEL': (int, '[0, 255]', 'run'),
    'MEAN': (tuple[float], None, 'network'),
    'STD': (tuple[float], '(0, inf)', 'network'),
    'SCALES': (tuple[float], '(0, inf)', 'run'),
    'CROP_SIZE': (int, '[1, inf)', 'network'),      # PSA's masks are sized
    'NUM_WORKERS': (int, '[0, inf)', 'machine'),
    'CACHE': (bool, None, 'machine'),
    'HEAD': (str, ('ema', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psa',
                   'nonlocal'), 'network'),
    'N_LAYERS': (int, (18, 34, 50, 101, 152), 'network'),
    'STEM': (str, ('deep', 'plain'), 'network'),
    'STRIDE': (int, (8, 16, 32), 'network'),
    'DROPOUT': (float, '[0, 1)', 'network'),
    'BN_MOM': (float, '[0, 1]', 'network'),
    'PRETRAINED': (str, None, 'run'),
    'PRETRAINED_PARTIAL': (bool, None, 'run'),
    'INIT_FROM': (str, None, 'run'),
    'EM_CHANNELS': (int, '[1, inf)', 'network'),
    'EM_BASES': (int, '[1, inf)', 'network'),
    'STAGE_NUM': (int, '[1, inf)', 'network'),
    'STAGE_NUM_EVAL': (int, '[0, inf)', 'network'),
    'EM_KEEP': (str, ('moving_avg', 'learned', 'fixed'), 'network'),
    'EM_MOM': (float, '[0, 1]', 'network'),
    'EM_NORM': (str, ('l2', 'layer', 'none'), 'network'),
    'EM_GRAD': (bool, None, 'network'),
    'BATCH_SIZE': (int, '[1, inf)', 'run'),
    'ACCUM': (int, '[1, inf)', 'run'),
    'ITER_MAX': (int, '[1, inf)', 'run'),
    'LR': (float, '[0, inf)', 'run'),
    'LR_MOM': (float, '[0, 1)', 'run'),
    'LR_DECAY': (int, '[1, inf)', 'run'),
    'POLY_POWER': (float, '[0, inf)', 'run'),
    'WEIGHT_DECAY': (float, '[0, inf)', 'run'),
    'LOSS': (str, ('cross_entropy', 'ohem'), 'run'),
    'OHEM_THRESHOLD': (float, '(0, 1]', 'run'),
    'OHEM_MIN_KEPT': (float, '(0, 1]', 'run'),
    'CLASS_WEIGHTS': (tuple[float], '[0, inf)', 'run'),
    'BALANCE_CLASSES': (bool, None, 'run'),
    'FREEZE': (str, ('', 'bn', 'backbone'), 'run'),
    'AVERAGE': (float, '[0, 1)', 'run'),
    'AMP': (str, ('auto', 'off', 'bf16', 'fp16'), 'run'),
    'COMPILE': (bool, None, 'run'),
    'RECOMPUTE': (bool, None, 'machine'),
    'SEED': (int, '[0, inf)', 'run'),
    'DETERMINISTIC': (bool, None, 'run'),
    'ITER_VAL': (int, '[0, inf)', 'run'),
    'EVAL_SCALES': (tuple[float], '(0, inf)', 'run'),
    'EVAL_FLIP': (bool, None, 'run'),
    'EVAL_WINDOW': (int, '[0, inf)', 'run'),
    'INFERENCE': (str, ('plain', 'folded', 'bf16'), 'run'),
    'EVAL_BATCH': (int, '[0, inf)', 'machine'),
    'EVAL_CLASSES': (tuple[int], '[0, 255]', 'run'),
    'DEVICES': (list[int], None, 'machine'),
    'ITER_SAVE': (int, '[1, inf)', 'machine'),
    'MODEL_DIR': (str, None, 'machine'),
    'LOG_DIR': (str, None, 'machine'),
}
_RENAMED = {'OHEM_LEAST': 'OHEM_MIN_KEPT',
            'CLASS_WEIGHTS=auto': 'BALANCE_CLASSES=True'}
_given = set()               # the names that the command line has set


class SettingError(ValueError):
    """A setting is unknown, or its value cannot be. One line for the user;
    exit_status as of utils.UserError, since this file imports nothing."""

    exit_status = 2


def as_dict():
    """Return {name: value} of all settings, plain values only."""
    return {name: value for name, value in globals().items()
            if name.isupper() and not name.startswith('_')}


def given():
    """Return {name: value} of what the command line has set."""
    return {name: globals()[name] for name in sorted(_given)}


def network_settings():
    """Return {name: value} of the settings that define the network."""
    return {name: globals()[name] for name, (_, _, about) in _TABLE.items()
            if about == 'network'}


def choices(name):
    """Return what a setting can be, where that is a list of choices."""
    return _TABLE[name][1]


# ------------------------------------------------- changing settings
def override(words):
    """Set the globals that words like 'KEY=VALUE' name; return the others.

    Raises SettingError for an unknown name (with the nearest one) and for a
    value of another type.
    """
    import difflib
    others, known = [], as_dict()
    for word in words:
        name, equals, text = word.partition('=')
        if not equals or not name.isidentifier():
            others.append(word)
            continue
        for old in {word, name} & set(_RENAMED):
            raise SettingError(f'{word}: {old} is now {_RENAMED[old]}')
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, 1, 0.0)[0]
            raise SettingError(f'{word}: there is no setting {name}; '
                               f'the nearest is {near}')
        globals()[name] = _parse(name, text, known[name])
        _given.add(name)
    return others


def override_all(words):
    """Set the globals that words like 'KEY=VALUE' name; raise SettingError
    for any other word."""
    others = override(words)
    if others:
        raise SettingError(f'{others[0]}: only KEY=VALUE words are taken '
                           f'here')


def adopt(recorded):
    """Take the network's settings from a checkpoint's record.

    What the command line has set stays. Returns {name: value} of what was
    changed by this, for the log.
    """
    changed = {name: recorded[name] for name, value
               in network_settings().items()
               if name in recorded and name not in _given
               and value != recorded[name]}
    globals().update(changed)
    return changed


def changed_since(recorded):
    """Return {name: (recorded value, value now)} of the settings that differ
    and that would alter the run, were it resumed with them."""
    now = as_dict()
    return {name: (recorded.get(name), now.get(name))
            for name in sorted({*now, *recorded})
            if recorded.get(name) != now.get(name)
            and _TABLE.get(name, ('', '', 'run'))[2] != 'machine'}


def _parse(name, text, default):
    """Return text as a value of the setting's type; raise SettingError."""
    import ast
    kind = _TABLE.get(name, (type(default),))[0]
    if kind is str:
        return text
    whole = getattr(kind, '__origin__', None)       # of tuple[...], list[...]
    item = kind.__args__[0] if whole else kind
    try:
        value = ast.literal_eval(text.strip())
        if whole:
            value = value if isinstance(value, (list, tuple)) else [value]
            return whole(_convert(item, each) for each in value)
        return _convert(item, value)
    except (ValueError, SyntaxError, TypeError):
        wanted = f'{whole.__name__} of ' if whole else ''
        raise SettingError(f'{name}={text}: {name} takes a value of type '
                           f'{wanted}{item.__name__}, such as {default!r}'
                           ) from None


def _convert(kind, value):
    """Return value as kind; only an int may pass for a float."""
    if type(value) is int and kind is float:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


# ------------------------------------------------- checking settings
def validate(for_training=False):
    """Raise SettingError unless every setting is in its range, and those that
    depend on each other agree; for_training: the rules of training too."""
    for name, (_, allowed, _) in _TABLE.items():
        value = globals()[name]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if not _is_allowed(each, allowed):
                raise SettingError(f'{name}={value}: it can be '
                                   f'{_describe(allowed)}')
    for holds, text in _rules(for_training):
        if not holds:
            raise SettingError(text)


def _is_allowed(value, allowed):
    """Tell whether a value is among the choices, or in a range as '[0, 1)'.
    """
    if not isinstance(allowed, str):
        return allowed is None or value in allowed
    low, high = (float(x) for x in allowed[1:-1].split(','))
    return ((low <= value if allowed[0] == '[' else low < value)
            and (value <= high if allowed[-1] == ']' else value < high))


def _describe(allowed):
    """Return choices or a range in words."""
    if not isinstance(allowed, str):
        return ', '.join(map(repr, allowed or ()))
    low, high = allowed[1:-1].split(', ')
    words = {'[': f'at least {low}', '(': f'above {low}', ']': f'at most '
             f'{high}', ')': f'below {high}'}
    return ' and '.join(words[mark] for mark, bound in (
        (allowed[0], low), (allowed[-1], high)) if 'inf' not in bound)


def _rules(for_training):
    """Yield (whether it holds, what to say if not) of the rules between
    settings."""
    n = N_CLASSES
    yield (all(i < n for i in EVAL_CLASSES),
           f'EVAL_CLASSES={EVAL_CLASSES}: classes are 0 to {n - 1} '
           f'(N_CLASSES={n})')
    for name, value in (('SCALES', SCALES), ('EVAL_SCALES', EVAL_SCALES)):
        yield value, f'{name}={value}: name at least one scale'
    for name, value in (('MEAN', MEAN), ('STD', STD)):
        yield len(value) == 3, f'{name}={value}: it is of R, G and B'
    if for_training:
        yield (not CLASS_WEIGHTS
               or len(CLASS_WEIGHTS) == n and any(CLASS_WEIGHTS),
               f'CLASS_WEIGHTS={CLASS_WEIGHTS}: it is (), or {n} numbers that '
               f'are not all 0 (N_CLASSES={n})')
        yield (not (CLASS_WEIGHTS and BALANCE_CLASSES),
               'CLASS_WEIGHTS and BALANCE_CLASSES=True: the weights come from '
               'one of them')
        yield (not (COMPILE and RECOMPUTE),
               'COMPILE=True and RECOMPUTE=True do not go together; a '
               'compiled backbone keeps less by itself')
        yield (not HEAD.startswith('deeplab') or BATCH_SIZE >= 2 * ACCUM,
               f'HEAD={HEAD} with BATCH_SIZE={BATCH_SIZE} and ACCUM={ACCUM}: '
               f'batch norm over the means of whole images needs at least 2 '
               f'images at a time')


def describe():
    """Return the settings, their values and what they can be, for --help."""
    lines = ['settings (KEY=VALUE); settings.py says what each is for:']
    for name, value in as_dict().items():
        kind, allowed, _ = _TABLE.get(name, (type(value), None, 'run'))
        kind = str(kind) if hasattr(kind, '__origin__') else kind.__name__
        lines.append(f'  {name} = {value!r} ({kind}'
                     + (f': {_describe(allowed)})' if allowed else ')'))
    return '\n'.join(lines)
