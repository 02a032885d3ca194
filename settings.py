"""The settings of this experiment: edit this file, or `KEY=VALUE` on the
command line for a smoke run or a sweep (`python train.py CROP_SIZE=129`).

The values are those of the paper's PASCAL VOC recipe, the names those of the
authors' 2019 code where it had one. This file holds literals and imports
nothing, so that two experiments are compared with `diff`.
"""

# ---------------------------------------------------------------- data
DATA_ROOT = 'data/voc'       # folder in the VOC layout; see README, "Data"
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
#                              (python network.py lists them), a file, '': none
PRETRAINED_PARTIAL = False   # True: the file may lack layers; they are named
INIT_FROM = ''               # a checkpoint whose weights to begin with, not
#                              its schedule: all that fits, what not is named

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
ACCUM = 1                    # parts that a step's batch is split into
ITER_MAX = 30000             # steps
LR = 9e-3                    # rate at the start; biases get twice the rate
LR_MOM = 0.9                 # momentum of SGD
LR_DECAY = 10                # the rate is set anew every so many steps
POLY_POWER = 0.9             # rate = LR * (1 - step / ITER_MAX) ** POLY_POWER
WEIGHT_DECAY = 1e-4          # of convolution weights; of nothing else
LOSS = 'cross_entropy'       # or 'ohem', of an image's hard pixels alone
OHEM_THRESHOLD = 0.7         # hard: the label's class is less probable, or
OHEM_LEAST = 0.0625          # the pixel among the hardest, this share of all
CLASS_WEIGHTS = ''           # of the classes in the loss: '1, 0.5, 2', 'auto'
#                              (the rarer in TRAIN_SPLIT the more), '': equal
FREEZE = ''                  # of the backbone: 'bn' (its statistics),
#                              'backbone' (its weights as well), '': nothing
AVERAGE = 0.0                # share kept by averaged weights a step; 0: none
AMP = 'auto'                 # 'auto' (bf16 on a GPU that has it), 'off',
#                              'bf16', 'fp16' (with a loss scaler)
COMPILE = False              # True: the backbone through torch.compile
RECOMPUTE = False            # True: half the memory for a quarter more time:
#                              the backbone's blocks are computed twice
SEED = 66                    # of weights, order and augmentation
DETERMINISTIC = False        # True: bit-equal runs on a GPU too, but slower

# ---------------------------------------------------------------- evaluation
ITER_VAL = 2000              # validate every so many steps; 0: at the end only
EVAL_SCALES = (1.0,)         # probabilities are averaged over these scales
EVAL_FLIP = False            # True: and over the left-right flip
EVAL_WINDOW = 0              # side of the windows, pixels, that slide over an
#                              image larger than it; 0: images seen whole,
#                              but for huge ones (README, "Evaluate")
INFERENCE = 'plain'          # 'plain' (a plain loop's bits), 'folded' (batch
#                              norm in the convolutions), 'bf16' (and bfloat16)
EVAL_BATCH = 0               # images of one size at once; 0: 8 on a GPU, or 1
EVAL_CLASSES = ()            # classes in the means, by number; (): all

# ---------------------------------------------------------------- machine
DEVICES = []                 # GPUs by number, a process each; -1: the CPU;
#                              []: all GPUs there are, else the CPU
ITER_SAVE = 2000             # step_N.pth; latest.pth ten times as often
MODEL_DIR = 'models'         # checkpoints
LOG_DIR = 'logdir'           # TensorBoard's events, log.csv, eval.json

# Free to change when a run is resumed: they do not alter what is learned.
_MACHINE = ('DATA_ROOT', 'DEVICES', 'NUM_WORKERS', 'LOG_DIR', 'MODEL_DIR',
            'ITER_SAVE', 'CACHE', 'RECOMPUTE', 'EVAL_BATCH')
# What defines the network: eval.py and predict.py take it from a checkpoint.
_NETWORK = ('N_CLASSES', 'MEAN', 'STD', 'HEAD', 'N_LAYERS', 'STEM', 'STRIDE',
            'DROPOUT', 'BN_MOM', 'EM_CHANNELS', 'EM_BASES', 'STAGE_NUM',
            'STAGE_NUM_EVAL', 'EM_KEEP', 'EM_MOM', 'EM_NORM', 'EM_GRAD',
            'CROP_SIZE')                # by which PSA's masks are sized
_given = set()               # the names that the command line has set


def as_dict():
    """Return {name: value} of all settings, plain values only."""
    return {name: value for name, value in globals().items()
            if name.isupper() and not name.startswith('_')}


def override(words):
    """Set the globals that words like 'KEY=VALUE' name; return the others.

    Raises ValueError for an unknown name (with the nearest one) and for a
    value of another type than the global has.
    """
    import difflib
    rest, known = [], as_dict()
    for word in words:
        name, equals, text = word.partition('=')
        if not equals or not name.isidentifier():
            rest.append(word)
            continue
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, 1, 0.0)[0]
            raise ValueError(f'{word}: there is no setting {name}; '
                             f'the nearest is {near}')
        globals()[name] = _parse(name, text, known[name])
        _given.add(name)
    return rest


def take(words):
    """Set the globals that words like 'KEY=VALUE' name, and allow no other
    words: ValueError."""
    rest = override(words)
    if rest:
        raise ValueError(f'{rest[0]}: only KEY=VALUE words are taken here')


def adopt(recorded):
    """Take the network's settings from a checkpoint's record.

    What the command line has set stays. Returns {name: value} of what was
    changed by this, for the log.
    """
    changed = {name: recorded[name] for name in _NETWORK
               if name in recorded and name not in _given
               and globals()[name] != recorded[name]}
    globals().update(changed)
    return changed


def given():
    """Return {name: value} of what the command line has set."""
    return {name: globals()[name] for name in sorted(_given)}


def changed_since(recorded):
    """Return {name: (recorded value, value now)} of the settings that differ
    and that would alter the run, were it resumed with them."""
    now = as_dict()
    return {name: (recorded.get(name), now.get(name))
            for name in sorted({*now, *recorded} - set(_MACHINE))
            if recorded.get(name) != now.get(name)}


def _parse(name, text, default):
    """Return text as a value of default's type, or raise ValueError."""
    import ast
    kind = type(default)
    if kind is str:
        return text
    wanted = kind.__name__
    try:
        value = ast.literal_eval(text.strip())
        if kind in (list, tuple):
            item = type(default[0]) if default else int
            wanted = f'{kind.__name__} of {item.__name__}'
            value = value if isinstance(value, (list, tuple)) else [value]
            return kind(_as(item, each) for each in value)
        return _as(kind, value)
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f'{name}={text}: {name} takes a value of type '
                         f'{wanted}, such as {default!r}') from None


def _as(kind, value):
    """Return value as kind; only an int may pass for a float."""
    if type(value) is int and kind is float:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value
