"""Trains the network that settings.py describes, and validates it.

    python train.py [KEY=VALUE ...]

Goes on from MODEL_DIR/latest.pth where that is there (`sh clean.sh` starts
anew). Writes latest.pth, step_N.pth, best.pth and final.pth into MODEL_DIR;
TensorBoard's events, log.csv and settings.json into LOG_DIR. The recipe is the
paper's, as the 2019 code ran it. Shapes: b images, n classes, H x W pixels.
"""
import ast
import contextlib
import difflib
import math
import os
import shutil
import sys
import tempfile
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import baselines
import dataset
import eval
import network
import settings
import utils

WEIGHTS = 'models'           # where downloaded backbone weights are kept
FREEZES = ('', 'bn', 'backbone')
AMPS = ('auto', 'off', 'bf16', 'fp16')
LOSSES = ('cross_entropy', 'ohem')
LEAST = {1: 'BATCH_SIZE ACCUM ITER_MAX ITER_SAVE LR_DECAY CROP_SIZE STRIDE '
            'EM_CHANNELS EM_BASES',
         0: 'ITER_VAL NUM_WORKERS SEED'}


# ------------------------------------------------- loss and optimizer
def segmentation_loss(logits, label, weight=None):
    """Return the cross-entropy of logits (b, n, H, W) and label (b, H, W);
    weight: of the classes, (n,).

    Void pixels cost nothing but count: the mean is over all pixels, as in
    the 2019 code. (reduction='mean' has no deterministic kernel on CUDA.)
    With LOSS=ohem it is over an image's hard pixels, then over the images.
    """
    label = label.long()
    loss = F.cross_entropy(network.wide(logits), label, reduction='none',
                           ignore_index=settings.IGNORE_LABEL)  # (b, H, W)
    hard = hard_pixels(loss, label) if settings.LOSS == 'ohem' else None
    if weight is not None:
        loss = loss * weight[label.clamp(max=len(weight) - 1)]
    if hard is None:
        return loss.mean()
    return ((loss * hard).flatten(1).sum(1)
            / hard.flatten(1).sum(1).clamp(min=1)).mean()


def hard_pixels(loss, label):
    """Return which pixels are hard, (b, H, W) bool, by their cross-entropy:
    the class of the label has a probability below OHEM_THRESHOLD, or the
    pixel is among the OHEM_LEAST share of its image that is hardest.

    Source: online hard example mining (Shrivastava et al., CVPR 2016), of
    pixels as the field has it. Differs: by image, not by batch, so that the
    loss does not depend on how a batch is split.
    """
    flat = loss.detach().flatten(1)                             # (b, H * W)
    least = max(1, int(settings.OHEM_LEAST * flat.shape[1]))
    bound = flat.topk(least).values[:, -1:].clamp(
        max=-math.log(settings.OHEM_THRESHOLD))
    hard = (flat >= bound).view(loss.shape)
    return hard & (label != settings.IGNORE_LABEL)


def given_weights():
    """Return the numbers of CLASS_WEIGHTS, [float]; [] where it has none.
    Raises ValueError."""
    given, n = settings.CLASS_WEIGHTS, settings.N_CLASSES
    if given in ('', 'auto'):
        return []
    try:
        numbers = [float(x) for x in (ast.literal_eval(given) if isinstance(
            given, str) else given)]
    except (ValueError, SyntaxError, TypeError):
        numbers = []
    if len(numbers) != n or not 0 <= min(numbers) <= max(
            numbers) < math.inf or not any(numbers):
        raise ValueError(f'CLASS_WEIGHTS={given}: it is "", "auto", or '
                         f'{n} numbers of at least 0 (N_CLASSES={n})')
    return numbers


def class_weights(data, device):
    """Return the weights of the classes in the loss, (n,) on the device; None
    for equal ones.

    'auto': 1 / ln(1.02 + a class's share of the labelled pixels), scaled so
    that a pixel weighs 1 on average. Source: Paszke et al., "ENet"
    (arXiv 1606.02147), section 5.2.
    """
    weight = torch.tensor(given_weights())
    if settings.CLASS_WEIGHTS == 'auto':
        counts = utils.gather(None if utils.rank() else
                              data.pixels().tolist())[0]
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        weight = 1 / torch.log(1.02 + share)
        weight = (weight / (weight * share).sum()).float()
        utils.log('CLASS_WEIGHTS=auto: ' + ' '.join(
            f'{x:.3g}' for x in weight.tolist()))
    return weight.to(device) if len(weight) else None


def param_groups(net):
    """Return SGD's three groups: weights of convolutions (decayed), all
    biases (twice the rate), and the rest, which is the weights of batch norm
    and learned bases. Frozen parameters are in none. 'times' multiplies the
    rate."""
    weights, biases, rest = [], [], []
    for module in net.modules():
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            if name.endswith('bias'):
                biases.append(param)
            elif name.endswith('weight') and param.ndim > 1:
                weights.append(param)
            else:
                rest.append(param)
    return [{'params': weights, 'weight_decay': settings.WEIGHT_DECAY,
             'times': 1},
            {'params': rest, 'weight_decay': 0.0, 'times': 1},
            {'params': biases, 'weight_decay': 0.0, 'times': 2}]


def set_rate(optimizer, step):
    """Set the rate of a step, from 1, and return it."""
    rate = utils.poly_lr(step, settings.LR, settings.ITER_MAX,
                         settings.POLY_POWER, settings.LR_DECAY)
    for group in optimizer.param_groups:
        group['lr'] = rate * group['times']
    return rate


def distributed(net):
    """Return the net, its gradients the mean over all processes."""
    if utils.world() == 1:
        return net
    with warnings.catch_warnings():     # its new name is not in every torch
        warnings.filterwarnings('ignore', '.*broadcast_buffers')
        return DistributedDataParallel(net, broadcast_buffers=False)


def together(model, last):
    """Return a context in which processes exchange gradients with the last
    part of a step alone."""
    many = isinstance(model, DistributedDataParallel)
    return contextlib.nullcontext() if last or not many else model.no_sync()


def gradients(model, batches, scaler, device, weight):
    """Add up the gradients of a step's parts; return (its loss, on the
    device, the images' IDs). weight: of the classes."""
    loss, ids, amp = torch.zeros((), device=device), [], amp_dtype(device)
    for part in range(settings.ACCUM):
        image, label, names = next(batches)         # (b, 3, H, W), (b, H, W)
        image = dataset.normalise(image, device).contiguous(
            memory_format=layout(device))
        with together(model, part == settings.ACCUM - 1):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(image)                       # (b, n, H, W)
            share = segmentation_loss(logits, label, weight) / settings.ACCUM
            scaler.scale(share).backward()
        loss, ids = loss + share.detach(), [*ids, *names]
    return loss, ids


def watch(net, loss, optimizer, scaler):
    """Return the figures that a step is watched by, {name: number on the
    device}: its loss, the norm of its gradient, what an EMA unit did."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(
        param.grad for param in net.parameters() if param.grad is not None)
    return {'loss': loss, 'grad_norm': norm, **{
        f'EM/{name}': number for unit in network.ema_units(net)
        for name, number in unit.figures.items()}}


def settle(step, ids, told, figures, log, bar):
    """Wait for what was told of a step, check its loss, write the step's
    figures; return whether to stop. Raises RuntimeError, with the images,
    unless the loss is finite."""
    found, stopping = told.read()
    loss = found['loss']
    if not math.isfinite(loss):
        raise RuntimeError(f'the loss is {loss} at step {step}, images '
                           f'{", ".join(ids)}; nothing was saved since the '
                           f'last latest.pth. Try a lower LR')
    log.write(step, **found, **figures)
    bar.set_postfix(loss=f'{loss:.3f}', lr=f'{figures["lr"]:.2e}',
                    images_s=f'{figures["images_per_s"]:.1f}', refresh=False)
    return stopping


# ------------------------------------------------- before the first step
def check_settings(processes=1):
    """Raise ValueError for settings that no run of so many processes has."""
    s = settings
    for least, names in LEAST.items():
        for name in names.split():
            if getattr(s, name) < least:
                raise ValueError(f'{name}={getattr(s, name)}: it is at least '
                                 f'{least}')
    if s.BATCH_SIZE % (s.ACCUM * processes):
        raise ValueError(f'BATCH_SIZE={s.BATCH_SIZE} does not divide into '
                         f'{processes} processes with ACCUM={s.ACCUM} parts '
                         f'each; change one of them (DEVICES)')
    if not s.SCALES or min(s.SCALES) <= 0:
        raise ValueError(f'SCALES={s.SCALES}: name at least one, all above 0')
    for name, choices in (('FREEZE', FREEZES), ('AMP', AMPS),
                          ('LOSS', LOSSES)):
        if getattr(s, name) not in choices:
            raise ValueError(f'{name}={getattr(s, name)}: it can be '
                             f'{", ".join(map(repr, choices))}')
    for name in ('AVERAGE', 'DROPOUT'):
        if not 0 <= getattr(s, name) < 1:
            raise ValueError(f'{name}={getattr(s, name)}: a share of 0 to '
                             f'below 1')
    for name in ('OHEM_THRESHOLD', 'OHEM_LEAST'):
        if not 0 < getattr(s, name) <= 1:
            raise ValueError(f'{name}={getattr(s, name)}: above 0, up to 1')
    given_weights()
    if s.INIT_FROM and not os.path.isfile(s.INIT_FROM):
        raise FileNotFoundError(f'INIT_FROM={s.INIT_FROM} is not there; name '
                                f'a checkpoint, such as models/final.pth of '
                                f'another run')
    if s.COMPILE and s.RECOMPUTE:
        raise ValueError('COMPILE=True and RECOMPUTE=True do not go together;'
                         ' a compiled backbone keeps less by itself')
    if s.COMPILE and not any(map(shutil.which, [
            os.environ.get('CXX', 'c++'), 'g++', 'clang++'])):
        raise ValueError('COMPILE=True: torch.compile needs a C++ compiler, '
                         'and there is no g++; install it or set '
                         'COMPILE=False')
    baselines.check_settings()
    eval.check_settings()
    if s.CROP_SIZE % s.STRIDE != 1:
        near = s.CROP_SIZE // s.STRIDE * s.STRIDE + 1
        utils.log(f'warning: CROP_SIZE={s.CROP_SIZE} is not k * STRIDE + 1, '
                  f'so that training and evaluation see different grids; '
                  f'{near} is')


def check_folders():
    """Raise OSError unless checkpoints and logs can be written."""
    for name in ('MODEL_DIR', 'LOG_DIR'):
        folder = getattr(settings, name)
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f'{name}={folder}: nothing can be written there '
                          f'({error.strerror}); name another folder'
                          ) from None


def check_apart(train_set, val_set):
    """Raise ValueError where images are in both, unless ALLOW_OVERLAP;
    val_set: '' for none."""
    both = sorted({*train_set.ids} & {*(val_set and val_set.ids)})
    if both and not settings.ALLOW_OVERLAP:
        raise ValueError(f'{len(both)} images of {val_set.split} are in '
                         f'{train_set.split} too, such as {both[0]}: their '
                         f'score would say nothing. Set VAL_SPLIT= for no '
                         f'validation, or ALLOW_OVERLAP=True')


def load_start(net):
    """Load the weights to begin with: INIT_FROM's, else the backbone that
    PRETRAINED names, fetched if need be."""
    if not settings.INIT_FROM:
        load_pretrained(net)
        return
    path = settings.INIT_FROM
    left, drawn = network.load_fitting(
        net, utils.load_checkpoint(path)['net'], path)
    for text, keys in (('not taken from it', left),
                       ('not in it and so random', drawn)):
        path += f'; {text}: {", ".join(keys)}' if keys else ''
    utils.log(f'weights: {path}')


def load_pretrained(net):
    """Load the backbone weights that PRETRAINED names."""
    path = pretrained_file()
    if path is None:
        utils.log('backbone: random weights' + (
            '; warning: FREEZE keeps them so' if settings.FREEZE else ''))
        return
    missing = network.load_backbone(net.extractor, utils.load(path), path,
                                    settings.PRETRAINED_PARTIAL)
    utils.log(f'backbone: {path}' + (
        f'; not in it and so random: {", ".join(missing)}' if missing else ''))


def pretrained_file():
    """Return the path of the backbone weights, None if none are wanted."""
    name, s = settings.PRETRAINED, settings
    if not name:
        return None
    if name == 'auto':
        name = network.USUAL.get((s.STEM, s.N_LAYERS))
        if name is None:
            raise ValueError(f'PRETRAINED=auto: no weights are known for '
                             f'N_LAYERS={s.N_LAYERS} with STEM={s.STEM}; '
                             f'name a file, or set PRETRAINED= for none')
    if os.path.isfile(name):
        return name
    if name not in network.KNOWN:
        near = difflib.get_close_matches(name, network.KNOWN, 1, 0.0)[0]
        raise ValueError(f'PRETRAINED={name} is neither a file nor a known '
                         f'name; the nearest known is {near}')
    folder, digest = network.KNOWN[name]
    path = os.path.join(WEIGHTS, f'{name}.pth')
    if os.path.exists(path):
        utils.check_hash(path, digest)
    else:
        utils.download(f'{folder}{name}.pth', path, digest)
    return path


def freeze(net):
    """Take from the optimizer what FREEZE says; tell the EMA unit how many
    parts a step has."""
    if settings.FREEZE == 'backbone':
        net.extractor.requires_grad_(False)
    for unit in network.ema_units(net):
        unit.accum = settings.ACCUM


def set_training(net):
    """Put the net into training mode, but for statistics that are frozen."""
    net.train()
    if settings.FREEZE:
        net.extractor.eval()        # nothing but batch norm has modes there


def amp_dtype(device):
    """Return the type that convolutions run in under AMP, None for float32.
    """
    if settings.AMP == 'auto':
        native = device.type == 'cuda' and torch.cuda.is_bf16_supported(
            including_emulation=False)
        return torch.bfloat16 if native else None
    return {'off': None, 'bf16': torch.bfloat16,
            'fp16': torch.float16}[settings.AMP]


def layout(device):
    """Return the memory format that a step is fastest in: channels last, but
    on a CPU in float32."""
    plain = device.type == 'cpu' and amp_dtype(device) is None
    return torch.contiguous_format if plain else torch.channels_last


# ------------------------------------------------- checkpoints
def checkpoint(run, step, best, whole):
    """Return what eval.py and predict.py need: weights, settings, classes;
    with whole, also what the run goes on from. All processes call it.

    run: {name: what has a state_dict}.
    """
    names, colours = utils.read_classes(settings.DATA_ROOT,
                                        settings.N_CLASSES)
    state = {'step': step, 'best': best, 'settings': settings.as_dict(),
             'classes': names, 'colours': colours, 'git': utils.git_hash(),
             'versions': utils.versions(),
             'processes': utils.world()}
    for name, part in run.items():
        if whole or name in ('net', 'average'):
            state[name] = part.state_dict()
    if whole:
        state['random'] = utils.gather(utils.random_state())
    return state


def resume(path, run):
    """Put everything back as latest.pth has it; return (step, best mIoU).

    Raises ValueError where a setting that alters the run has changed, or
    the file cannot be gone on from.
    """
    state = utils.load(path)
    if not isinstance(state, dict) or 'optimizer' not in state:
        raise ValueError(f'{path} is no run to go on with: it holds no '
                         f'optimizer. Move it away to start anew')
    changed = settings.changed_since(state['settings'])
    if changed:
        listed = ', '.join(f'{name} {old!r} -> {new!r}'
                           for name, (old, new) in changed.items())
        raise ValueError(f'{path} is of a run with other settings ({listed});'
                         f' put them back, or start anew with sh clean.sh')
    for name, part in run.items():
        if name in ('net', 'average'):
            network.load_whole(part, state[name], path)
        else:
            part.load_state_dict(state[name])
    if len(state['random']) == utils.world():
        utils.set_random_state(state['random'][utils.rank()])
    else:
        utils.log(f'warning: {path} is of {len(state["random"])} processes, '
                  f'these are {utils.world()}: dropout will differ')
    for name, now in utils.versions().items():
        if state['versions'].get(name) != now:
            utils.log(f'warning: {path} was written with {name} '
                      f'{state["versions"].get(name)}, this is {now}: the '
                      f'run goes on, but not bit for bit')
    utils.log(f'{path}: going on after step {state["step"]}')
    return state['step'], state['best']


# ------------------------------------------------- the run
def build(device, fresh):
    """Return (net, optimizer, averaged net or None), on the device; fresh:
    start from INIT_FROM or the pretrained backbone."""
    utils.seed(settings.SEED, settings.DETERMINISTIC)
    net = baselines.build_network()
    if fresh:
        load_start(net)
    freeze(net)
    net.to(device, memory_format=layout(device))
    if utils.world() > 1:
        net = network.sync_batch_norm(net)
    net.extractor.recompute = settings.RECOMPUTE
    if settings.COMPILE:
        net.extractor.compile()
    optimizer = torch.optim.SGD(param_groups(net), settings.LR,
                                settings.LR_MOM, fused=True)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(
        settings.AVERAGE)) if settings.AVERAGE else None
    torch.manual_seed(settings.SEED + utils.rank())     # of dropout
    return net, optimizer, average


def validate(nets, data, step, figures, log):
    """Add the val mIoU of each net {figure's name: net}, and IoU of each
    class, to the figures, and say it; all processes share the images. Then
    draw what the first net, which is put back into training mode, sees."""
    classes, _ = utils.read_classes(data.root, data.n_classes)
    confusions = []
    with torch.compiler.set_stance('force_eager'):      # sizes vary
        for name, net in nets.items():
            confusions.append(eval.measure(net, data))
            found = utils.scores(confusions[-1], settings.EVAL_CLASSES)
            figures[name] = found['mIoU']
            figures.update({
                f'{name.replace("val_m", "")}/{class_name}': iou
                for class_name, iou in zip(classes, found['IoU'])
                if iou is not None})
            utils.log(f'step {step}: {name.replace("_", " ")} '
                      f'{100 * found["mIoU"]:.2f}')
        net = nets['val_mIoU']
        log.pictures(step, eval.drawings(net, data, confusions[0]))
    set_training(net)


def main():
    settings.take(sys.argv[1:])
    s, stop = settings, utils.StopRequest()

    # what can fail is tried before the first step
    devices = utils.pick_devices(s.DEVICES)
    check_settings(utils.world() if utils.launched() else len(devices))
    check_folders()
    checked = utils.spawned()       # by the process that started this one
    train_set = eval.open_split(s.TRAIN_SPLIT, True, checked)
    val_set = s.VAL_SPLIT and eval.open_split(s.VAL_SPLIT, False, checked)
    check_apart(train_set, val_set)
    device = utils.join(devices)
    utils.log(f'device: {utils.describe_device(device)}, processes: '
              f'{utils.world()}')

    latest = os.path.join(s.MODEL_DIR, 'latest.pth')
    resumed = utils.agreed(os.path.exists(latest), f'{latest} is there')
    net, optimizer, average = build(device, fresh=not resumed)
    scaler = torch.amp.GradScaler(
        device.type, enabled=amp_dtype(device) is torch.float16)
    nets = {'val_mIoU': net}
    run = {'net': net, 'optimizer': optimizer, 'scaler': scaler}
    if average:
        run['average'] = nets['val_mIoU_average'] = average.module
    start, best = resume(latest, run) if resumed else (0, 0.0)
    if average:
        average.n_averaged.fill_(start)
    model, weight = distributed(net), class_weights(train_set, device)
    loader = dataset.train_loader(train_set, start, utils.rank(),
                                  utils.world(), utils.progress)
    log = utils.Log(s.LOG_DIR, start)
    log.settings(s.as_dict())

    def keep(name, whole=False):
        state = checkpoint(run, step, best, whole)
        if utils.rank() == 0:
            utils.save(state, os.path.join(s.MODEL_DIR, name))

    step, batches = start, dataset.to_device(loader, device)
    bar = utils.progress(total=s.ITER_MAX, initial=start, desc='train',
                         unit='step')
    set_training(net)
    before, now = None, time.perf_counter()
    for step in range(start + 1, s.ITER_MAX + 1):
        rate = set_rate(optimizer, step)
        loss, ids = gradients(model, batches, scaler, device, weight)
        told = utils.Told(watch(net, loss, optimizer, scaler), bool(stop))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average:
            average.update_parameters(net)

        # the loss is read a step late, while the device computes
        stopping = before is not None and settle(*before, log, bar)
        figures = {'lr': rate, 'images_per_s': s.BATCH_SIZE / (
            time.perf_counter() - now)}
        before = step, ids, told, figures
        bar.update()

        last, better = step == s.ITER_MAX, False
        if val_set and (last or s.ITER_VAL and step % s.ITER_VAL == 0):
            validate(nets, val_set, step, figures, log)
            better = figures['val_mIoU'] > best
            best = max(best, figures['val_mIoU'])
        often = last or step % max(1, s.ITER_SAVE // 10) == 0
        seldom = step % s.ITER_SAVE == 0
        if better or often or seldom or stopping:   # and before a save at once
            stopping = settle(*before, log, bar) or stopping
            before = None
        if better:
            keep('best.pth')
        if often or stopping:
            keep('latest.pth', whole=True)
        if seldom:
            keep(f'step_{step}.pth', whole=True)
        if stopping and not last:
            bar.close()
            utils.log(f'{stop.name or "a signal"}: stopped after step {step};'
                      f' python train.py goes on')
            utils.leave(utils.STOPPED)
        now = time.perf_counter()

    keep('final.pth')
    bar.close()
    log.close()
    utils.log(f'done: {os.path.join(s.MODEL_DIR, "final.pth")}, step {step}'
              + (f', best val mIoU {100 * best:.2f}' if val_set else ''))
    utils.leave(0)


if __name__ == '__main__':
    utils.launch(main)
