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
MEAN = (0.485, 0.456, 0.406)  # of R, G, B in 0..1, subtracted; (): as the
#                              backbone's own weights were trained with
STD = (0.229, 0.224, 0.225)  # of R, G, B in 0..1, divided by; (): as MEAN
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # training scales, one drawn
COLOR_JITTER = 0.0           # brightness, contrast and saturation by factors
#                              of 1 -+ this, hue by a quarter of it; 0: off
CROP_SIZE = 513              # side of the crop, pixels; k * STRIDE + 1
NUM_WORKERS = 4              # loader processes, for each training process
CACHE = False                # True: decode a small set once, into memory

# ---------------------------------------------------------------- network
HEAD = 'ema'                 # 'ema' (EMANet), 'no_ema' (the same without its
#                              unit), 'nonlocal', 'fcn' (a classifier alone),
#                              'deeplabv3', 'deeplabv3plus', 'psa'
BACKBONE = ''                # an encoder of timm, as 'convnext_tiny'; '': the
#                              paper's ResNet, by N_LAYERS and STEM
N_LAYERS = 101               # of the ResNet: 18, 34, 50, 101, 152
STEM = 'deep'                # 'deep' (three 3x3), 'plain' (torchvision's 7x7)
STRIDE = 8                   # output stride of the backbone: 8, 16, 32; 14
#                              is of vision transformers
DROPOUT = 0.1                # of whole channels before the classifier
BN_MOM = 3e-4                # share of the running statistics replaced a step
PRETRAINED = 'auto'          # 'auto' (by N_LAYERS and STEM, or BACKBONE), a
#                              known name (docs/data.md), a file, '': none
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
EM_ZERO_INIT = False         # True: the unit starts as the identity (ours)

# ---------------------------------------------------------------- training
BATCH_SIZE = 16              # images a step, over all processes
ACCUM = 1                    # micro-batches a step (gradient accumulation)
ITER_MAX = 30000             # steps
LR = 9e-3                    # learning rate at the start; of biases twice that
OPTIMIZER = 'sgd'            # or 'adamw', whose biases have the plain LR
LR_MOM = 0.9                 # momentum of SGD; the first beta of AdamW
SCHEDULE = 'poly'            # of the learning rate: 'poly', 'cosine' to 0
LR_DECAY = 10                # poly: steps between changes of the learning rate
POLY_POWER = 0.9             # poly: LR * (1 - step / ITER_MAX) ** POLY_POWER
WARMUP = 0                   # steps in which the learning rate rises linearly
BACKBONE_LR = 1.0            # factor of the learning rate of the backbone
CLIP_GRAD = 0.0              # largest norm of a step's gradient; 0: any
WEIGHT_DECAY = 1e-4          # of convolution weights; of nothing else
LABEL_SMOOTHING = 0.0        # share of the label that all classes divide
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
COMPILE = False              # True: network and loss through torch.compile
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
#                              (folded, and convolutions in bfloat16),
#                              'compiled' (folded, through torch.compile)
EVAL_BATCH = 0               # images of one size at once; 0: one, but on a GPU
#                              up to 8, by their size
EVAL_CLASSES = ()            # classes in the means, by number; (): all

# ---------------------------------------------------------------- machine
DEVICES = []                 # GPUs by number, a process each; -1: the CPU;
#                              []: all GPUs there are, else the CPU
ITER_SAVE = 2000             # step_N.pth; latest.pth ten times as often
MODEL_DIR = 'models'         # checkpoints
LOG_DIR = 'logdir'           # TensorBoard's events, log.csv, eval.json
WANDB = ''                   # a project of Weights & Biases, which shows the
#                              same as TensorBoard; '': none

# ------------------------------------------------- the table of settings
# name: (type, choices or range, what it is about). 'network': a checkpoint
# brings it along; 'machine': may change when a run is resumed; 'run': may not.
_TABLE = {
    'DATA_ROOT': (str, None, 'machine'),
    'TRAIN_SPLIT': (str, None, 'run'),
    'VAL_SPLIT': (str, None, 'run'),
    'ALLOW_OVERLAP': (bool, None, 'run'),
    'N_CLASSES': (int, '2 to 256', 'network'),
    'IGNORE_LABEL': (int, '0 to 255', 'run'),
    'MEAN': (tuple[float], '0 to 1', 'network'),
    'STD': (tuple[float], '0.001 to 1', 'network'),
    'SCALES': (tuple[float], '0.05 to 16', 'run'),
    'COLOR_JITTER': (float, '0 to 1', 'run'),
    'CROP_SIZE': (int, '1 to 8,193', 'network'),        # PSA's masks are sized
    'NUM_WORKERS': (int, '0 to 1,024', 'machine'),
    'CACHE': (bool, None, 'machine'),
    'HEAD': (str, ('ema', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psa',
                   'nonlocal', 'no_ema'), 'network'),
    'BACKBONE': (str, None, 'network'),
    'N_LAYERS': (int, (18, 34, 50, 101, 152), 'network'),
    'STEM': (str, ('deep', 'plain'), 'network'),
    'STRIDE': (int, (8, 14, 16, 32), 'network'),
    'DROPOUT': (float, '0 to 0.99', 'network'),
    'BN_MOM': (float, '0 to 1', 'network'),
    'PRETRAINED': (str, None, 'run'),
    'PRETRAINED_PARTIAL': (bool, None, 'run'),
    'INIT_FROM': (str, None, 'run'),
    'EM_CHANNELS': (int, '1 to 8,192', 'network'),
    'EM_BASES': (int, '1 to 8,192', 'network'),
    'STAGE_NUM': (int, '1 to 1,000', 'network'),
    'STAGE_NUM_EVAL': (int, '0 to 1,000', 'network'),
    'EM_KEEP': (str, ('moving_avg', 'learned', 'fixed'), 'network'),
    'EM_MOM': (float, '0 to 1', 'network'),
    'EM_NORM': (str, ('l2', 'layer', 'none'), 'network'),
    'EM_GRAD': (bool, None, 'network'),
    'EM_ZERO_INIT': (bool, None, 'run'),
    'BATCH_SIZE': (int, '1 to 65,536', 'run'),
    'ACCUM': (int, '1 to 65,536', 'run'),
    'ITER_MAX': (int, '1 to 100,000,000', 'run'),
    'LR': (float, '0 to 1,000,000', 'run'),
    'OPTIMIZER': (str, ('sgd', 'adamw'), 'run'),
    'LR_MOM': (float, '0 to 0.9999', 'run'),
    'SCHEDULE': (str, ('poly', 'cosine'), 'run'),
    'LR_DECAY': (int, '1 to 100,000,000', 'run'),
    'POLY_POWER': (float, '0 to 100', 'run'),
    'WARMUP': (int, '0 to 100,000,000', 'run'),
    'BACKBONE_LR': (float, '0 to 100', 'run'),
    'CLIP_GRAD': (float, '0 to 1,000,000', 'run'),
    'WEIGHT_DECAY': (float, '0 to 1', 'run'),
    'LABEL_SMOOTHING': (float, '0 to 0.99', 'run'),
    'LOSS': (str, ('cross_entropy', 'ohem'), 'run'),
    'OHEM_THRESHOLD': (float, '0.0001 to 1', 'run'),
    'OHEM_MIN_KEPT': (float, '0.0001 to 1', 'run'),
    'CLASS_WEIGHTS': (tuple[float], '0 to 1,000,000', 'run'),
    'BALANCE_CLASSES': (bool, None, 'run'),
    'FREEZE': (str, ('', 'bn', 'backbone'), 'run'),
    'AVERAGE': (float, '0 to 0.999999', 'run'),
    'AMP': (str, ('auto', 'off', 'bf16', 'fp16'), 'run'),
    'COMPILE': (bool, None, 'run'),
    'RECOMPUTE': (bool, None, 'machine'),
    'SEED': (int, '0 to 4,294,967,295', 'run'),
    'DETERMINISTIC': (bool, None, 'run'),
    'ITER_VAL': (int, '0 to 100,000,000', 'machine'),
    'EVAL_SCALES': (tuple[float], '0.05 to 16', 'run'),
    'EVAL_FLIP': (bool, None, 'run'),
    'EVAL_WINDOW': (int, '0 to 65,536', 'run'),
    'INFERENCE': (str, ('plain', 'folded', 'bf16', 'compiled'), 'run'),
    'EVAL_BATCH': (int, '0 to 65,536', 'machine'),
    'EVAL_CLASSES': (tuple[int], '0 to 255', 'run'),
    'DEVICES': (list[int], '-1 to 1,023', 'machine'),
    'ITER_SAVE': (int, '1 to 100,000,000', 'machine'),
    'MODEL_DIR': (str, None, 'machine'),
    'LOG_DIR': (str, None, 'machine'),
    'WANDB': (str, None, 'machine'),
}
_RENAMED = {'OHEM_LEAST': 'OHEM_MIN_KEPT',
            'CLASS_WEIGHTS=auto': 'BALANCE_CLASSES=True'}
_TYPES = {                   # type: (what messages call it, an example)
    str: ('str', 'name'), bool: ('bool', True), int: ('int', 64),
    float: ('float', 0.5), tuple[float]: ('tuple of float', (0.5, 0.75, 1.0)),
    tuple[int]: ('tuple of int', (0, 1)), list[int]: ('list of int', [0, 1])}
_given = set()               # the names that the command line has set


class SettingError(ValueError):
    """A setting is unknown or its value cannot be: as utils.UserError, which
    this file, importing nothing, does without."""

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
    Raises SettingError for a name or a value that cannot be, there or here."""
    check_file()
    others = []
    for word in words:
        name, equals, text = word.partition('=')
        plain = name.strip(' -').replace('-', '_').upper()
        if plain in _TABLE and not name.isidentifier() or (
                name in _TABLE and not equals):     # --lr, 'LR = 1', LR
            raise SettingError(f'{word}: a setting is written KEY=VALUE, '
                               f'without blanks: {plain}={globals()[plain]}')
        for old in {word, name} & {*_RENAMED}:
            raise SettingError(f'{word}: {old} is now {_RENAMED[old]}')
        if not equals or not name.isidentifier():
            others.append(word)
        elif name in _TABLE:
            globals()[name] = check_value(name, _parse(name, text), text=text)
            _given.add(name)
        else:
            raise SettingError(f'{word}: there is no setting {name}; '
                               f'{_nearest(name) or "--help lists them"}')
    return others


def override_all(words):
    """Set the globals that words like 'KEY=VALUE' name; raise SettingError
    for any other word."""
    others = override(words)
    if others:
        raise SettingError(f'{others[0] or "an empty word"}: only KEY=VALUE '
                           f'words are taken here; --help lists them')


def adopt(recorded, names=None):
    """Take settings, the network's if none are named, from a checkpoint's
    record, but for what the command line has set; return {name: value} of
    what this changed. Raises SettingError for a value that cannot be."""
    found = {name: check_value(name, recorded[name], 'in the checkpoint, ')
             for name in names or network_settings()
             if name in recorded and name not in _given}
    changed = {name: value for name, value in found.items()
               if value != globals()[name]}
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


def _nearest(name):
    """Return 'the nearest is NAME', '' where no setting is near."""
    import difflib
    near = difflib.get_close_matches(name.upper(), _TABLE, 1)
    return f'the nearest is {near[0]}' if near else ''


def _parse(name, text):
    """Return the value of a text, or the text; one number does for a list."""
    import ast
    kind = _TABLE[name][0]
    try:
        value = text if kind is str else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return [value] if hasattr(kind, '__origin__') and type(value) in (
        int, float) else value


# ------------------------------------------------- checking settings
def validate(for_training=False):
    """Raise SettingError unless every setting is valid, and those that depend
    on each other agree; for_training: by the rules of training too."""
    check_file()
    for holds, text in _rules(for_training):
        if not holds:
            raise SettingError(text)


def check_file():
    """Raise SettingError unless this file, edited by hand, has the settings
    of the table and no others, each of its type and in its range."""
    for name in [*globals()]:
        if (name not in _TABLE and not name.startswith('_')
                and (name.isupper() or name.upper() in _TABLE)):
            hint = (f'it is now {_RENAMED[name]}' if name in _RENAMED else
                    _nearest(name) or 'a new one needs a row in _TABLE')
            raise SettingError(f'settings.py: {name} is no setting; {hint}')
    for name, (kind, _, _) in _TABLE.items():
        if name not in globals():
            raise SettingError(f'settings.py: {name} is missing; add a value '
                               f'of type {_TYPES[kind][0]}, such as {name} = '
                               f'{_guess(name, None)!r}')
        globals()[name] = check_value(name, globals()[name], 'settings.py: ')


def check_value(name, value, source='', text=''):
    """Return a value as the setting's type; raise SettingError for another
    type or range. source: '' for the command line, which has the text."""
    kind, allowed, _ = _TABLE[name]
    try:
        value = _convert(kind, value)
    except (TypeError, OverflowError):
        example = f'{name} = {_guess(name, value)!r}'
        if not source:                              # what a shell takes
            example = example.translate(dict.fromkeys(map(ord, ' ()[]')))
        raise SettingError(f'{source}{name}={repr(value) if source else text}'
                           f': {name} takes a value of type '
                           f'{_TYPES[kind][0]}, such as {example}') from None
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if not _is_allowed(each, allowed):
            raise SettingError(f'{source}{name}={value}: it can be '
                               + str(allowed).strip('()'))
    return value


def _convert(kind, value):
    """Return value as kind; an int passes for a float, a list for a tuple."""
    if hasattr(kind, '__origin__') and isinstance(value, (list, tuple)):
        return kind.__origin__(_convert(kind.__args__[0], x) for x in value)
    if type(value) is not kind and (type(value), kind) != (int, float):
        raise TypeError
    return kind(value)


def _guess(name, value):
    """Return what a value of another type may stand for, else an example."""
    (kind, allowed, _), text = _TABLE[name], str(value).removesuffix('.0')
    try:
        return _convert(kind, None if value is None else _parse(name, text))
    except (TypeError, OverflowError):
        return allowed[0] if type(allowed) is tuple else _TYPES[kind][1]


def _is_allowed(value, allowed):
    """Tell whether a value is among the choices, or in a range as '0 to 1'."""
    if not isinstance(allowed, str):
        return allowed is None or value in allowed
    low, high = allowed.replace(',', '').split(' to ')
    return float(low) <= value <= float(high)


def _rules(for_training):
    """Yield (whether it holds, what to say if not) of the rules between
    settings."""
    import re
    n = N_CLASSES
    yield (len({*EVAL_CLASSES} & {*range(n)}) == len(EVAL_CLASSES),
           f'EVAL_CLASSES={EVAL_CLASSES}: classes are 0 to {n - 1}, each once '
           f'(N_CLASSES={n})')
    for name in ('DATA_ROOT', 'SCALES', 'EVAL_SCALES', 'MODEL_DIR', 'LOG_DIR'):
        yield globals()[name], f'{name}={globals()[name]}: it cannot be empty'
    for name, value in (('MEAN', MEAN), ('STD', STD)):
        yield (len(value) in (0, 3),
               f'{name}={value}: it is of R, G and B, or ()')
    yield (not WANDB or re.fullmatch(r'([-\w.]+/)?[-\w.]{1,128}', WANDB, re.A),
           f'WANDB={WANDB}: it is PROJECT or ENTITY/PROJECT, of letters, '
           f'digits, -, _ and .')
    yield (BACKBONE or STRIDE != 14,
           f'STRIDE={STRIDE}: the ResNet has 8, 16 or 32')
    if for_training:
        yield (CROP_SIZE > 2 * STRIDE,
               f'CROP_SIZE={CROP_SIZE} with STRIDE={STRIDE}: at least '
               f'{2 * STRIDE + 1}, for a grid of 3 x 3')
        yield (not (BACKBONE and PRETRAINED_PARTIAL), f'PRETRAINED_PARTIAL '
               f'with BACKBONE={BACKBONE}: it is of the ResNet alone; an '
               f'encoder of timm takes whole files')
        yield (WARMUP < ITER_MAX, f'WARMUP={WARMUP}: it ends before '
               f'ITER_MAX={ITER_MAX}')
        yield (not CLASS_WEIGHTS or len(CLASS_WEIGHTS) == n and any(
            CLASS_WEIGHTS), f'CLASS_WEIGHTS={CLASS_WEIGHTS}: it is (), or {n} '
            f'numbers that are not all 0 (N_CLASSES={n})')
        yield (not (CLASS_WEIGHTS and BALANCE_CLASSES), 'CLASS_WEIGHTS and '
               'BALANCE_CLASSES=True do not go together; choose one')
        yield (not HEAD.startswith('deeplab') or BATCH_SIZE >= 2 * ACCUM,
               f'HEAD={HEAD} with BATCH_SIZE={BATCH_SIZE} and ACCUM={ACCUM}: '
               f'it needs at least 2 images at a time, for its batch norm')


def describe():
    """Return the settings by the sections of this file, with values as they
    are now, comments, and choices or ranges, for --help."""
    import textwrap
    with open(__file__, encoding='utf-8') as file:
        top = file.read().partition('\n# ---')[2].partition('the table of')[0]
    comments, lines = {}, ['settings (KEY=VALUE, or edited in settings.py)']
    for row in f'# {top}'.splitlines()[:-1]:
        code, _, comment = row.partition('#')
        if ' =' in code or comment[:4] == ' ---':       # or a section's title
            name = code.partition(' =')[0] or comment.strip(' -')
        comments[name] = f'{comments.get(name, "")} {comment.strip()}'.strip()
    for name, comment in comments.items():
        if name not in _TABLE:
            lines += ['', f'{name}:']
            continue
        allowed = _TABLE[name][1] or ()
        if isinstance(allowed, str) or not all(
                repr(each) in comment for each in allowed):
            words = str(allowed).strip('()').replace(' ', '\xa0')
            comment += f' ({words})'                # not to be broken
        lines += textwrap.wrap(comment, 79, break_long_words=False,
                               initial_indent=f'  {name} = '
                               f'{globals().get(name)!r}'.ljust(28) + '  ',
                               subsequent_indent=30 * ' ')
    return '\n'.join(lines).replace('\xa0', ' ')
