"""Trains the network that settings.py describes, and validates it.

    python train.py [KEY=VALUE ...]

Goes on from MODEL_DIR/latest.pth where that is there (`sh clean.sh` starts
anew). Writes latest.pth, step_N.pth, best.pth and final.pth into MODEL_DIR;
TensorBoard's events and log.csv into LOG_DIR. The recipe is the paper's, as
the 2019 code ran it. Shapes: b images, n classes, H x W pixels.
"""
import difflib
import math
import os
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

import baselines
import dataset
import eval
import network
import settings
import utils

WEIGHTS = 'models'           # where downloaded backbone weights are kept


# ------------------------------------------------- loss and optimizer
def segmentation_loss(logits, label):
    """Return the cross-entropy of logits (b, n, H, W) and label (b, H, W).

    Void pixels cost nothing but count: the mean is over all pixels, as in
    the 2019 code. (reduction='mean' has no deterministic kernel on CUDA.)
    """
    return F.cross_entropy(network.wide(logits), label.long(),
                           ignore_index=settings.IGNORE_LABEL,
                           reduction='none').mean()


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


# ------------------------------------------------- before the first step
def check_settings():
    """Raise ValueError for settings that no run can have."""
    s = settings
    for name in ('BATCH_SIZE', 'ITER_MAX', 'ITER_SAVE', 'LR_DECAY',
                 'CROP_SIZE'):
        if getattr(s, name) < 1:
            raise ValueError(f'{name}={getattr(s, name)}: it is at least 1')
    if not s.SCALES or min(s.SCALES) <= 0:
        raise ValueError(f'SCALES={s.SCALES}: name at least one, all above 0')
    eval.check_classes(s.EVAL_CLASSES)
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


def open_split(split, train):
    """Return a split whose every label was looked at; its classes' names and
    colours are checked against N_CLASSES."""
    data = dataset.Segmentation(split, train)
    names, _ = utils.read_classes(data.root, data.n_classes)
    counts = data.check(lambda results: utils.progress(
        results, total=len(data), desc=f'check {split}', leave=False))
    absent = [name for name, count in zip(names, counts) if not count]
    if train and absent:
        utils.log(f'warning: no pixel of {split} is {", ".join(absent)}')
    return data


def load_pretrained(net):
    """Load the backbone weights that PRETRAINED names, fetched if need be."""
    path = pretrained_file()
    if path is None:
        utils.log('backbone: random weights')
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


# ------------------------------------------------- checkpoints
def checkpoint(net, step, best):
    """Return what eval.py and predict.py need: weights, settings, classes."""
    names, colours = utils.read_classes(settings.DATA_ROOT,
                                        settings.N_CLASSES)
    return {'net': net.state_dict(), 'step': step, 'best': best,
            'settings': settings.as_dict(), 'classes': names,
            'colours': colours, 'git': utils.git_hash(),
            'versions': utils.versions()}


def resumable(state, optimizer):
    """Return a checkpoint with all that a run goes on from."""
    return {**state, 'optimizer': optimizer.state_dict(),
            'random': torch.get_rng_state(),
            'cuda_random': torch.cuda.get_rng_state_all()}


def resume(path, net, optimizer):
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
    network.load_whole(net, state['net'], path)
    optimizer.load_state_dict(state['optimizer'])
    torch.set_rng_state(state['random'])
    if state['cuda_random']:
        torch.cuda.set_rng_state_all(state['cuda_random'])
    return state['step'], state['best']


def main():
    settings.take(sys.argv[1:])
    s, stop = settings, utils.StopRequest()

    # what can fail is tried before the first step
    check_settings()
    check_folders()
    device = utils.pick_device(s.DEVICES)
    utils.log(f'device: {utils.describe_device(device)}')
    utils.seed(s.SEED, s.DETERMINISTIC)
    train_set = open_split(s.TRAIN_SPLIT, train=True)
    val_set = open_split(s.VAL_SPLIT, train=False) if s.VAL_SPLIT else None
    net = baselines.build_network()
    latest = os.path.join(s.MODEL_DIR, 'latest.pth')
    if not os.path.exists(latest):
        load_pretrained(net)
    net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(param_groups(net), s.LR, s.LR_MOM)
    start, best = (resume(latest, net, optimizer)
                   if os.path.exists(latest) else (0, 0.0))
    if start:
        utils.log(f'{latest}: going on after step {start}')
    loader = dataset.train_loader(train_set, start)
    log = utils.Log(s.LOG_DIR, start)
    log.text('settings', '\n'.join(
        f'{name} = {value!r}' for name, value in s.as_dict().items()))

    def keep(name, whole=False):
        state = checkpoint(net, step, best)
        utils.save(resumable(state, optimizer) if whole else state,
                   os.path.join(s.MODEL_DIR, name))

    step = start
    bar = utils.progress(total=s.ITER_MAX, initial=start, desc='train',
                         unit='step')
    now = time.perf_counter()
    for step, (image, label, ids) in enumerate(loader, start + 1):
        rate = set_rate(optimizer, step)

        image = dataset.normalise(image, device)            # (b, 3, H, W)
        label = label.to(device, non_blocking=True)         # (b, H, W)

        loss = segmentation_loss(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f'the loss is {value} at step {step}, images '
                               f'{", ".join(ids)}; nothing was saved since '
                               f'the last latest.pth. Try a lower LR')
        optimizer.step()

        speed = len(ids) / (time.perf_counter() - now)
        figures = {'loss': value, 'lr': rate, 'images_per_s': speed}
        bar.set_postfix(loss=f'{value:.3f}', lr=f'{rate:.2e}',
                        images_s=f'{speed:.1f}', refresh=False)
        bar.update()

        last = step == s.ITER_MAX
        if val_set and (last or s.ITER_VAL and step % s.ITER_VAL == 0):
            found = utils.scores(eval.evaluate(
                net, dataset.val_loader(val_set), s.EVAL_SCALES,
                s.EVAL_FLIP), s.EVAL_CLASSES)
            figures['val_mIoU'] = found['mIoU']
            utils.log(f'step {step}: val mIoU {100 * found["mIoU"]:.2f}')
            if found['mIoU'] > best:
                best = found['mIoU']
                keep('best.pth')
        log.write(step, **figures)
        if last or stop or step % max(1, s.ITER_SAVE // 10) == 0:
            keep('latest.pth', whole=True)
        if step % s.ITER_SAVE == 0:
            keep(f'step_{step}.pth', whole=True)
        if stop and not last:
            bar.close()
            utils.log(f'{stop.name}: stopped after step {step}; '
                      f'python train.py goes on')
            sys.exit(utils.STOPPED)
        now = time.perf_counter()

    keep('final.pth')
    bar.close()
    log.close()
    utils.log(f'done: {os.path.join(s.MODEL_DIR, "final.pth")}, step {step}'
              + (f', best val mIoU {100 * best:.2f}' if val_set else ''))


if __name__ == '__main__':
    utils.launch(main)
