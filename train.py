"""Trains the network that settings.py describes, and validates it.

    python train.py [KEY=VALUE ...]

Resumes from MODEL_DIR/latest.pth where that is there (`sh clean.sh`, given the
same words, starts anew). Writes latest.pth, step_N.pth, best.pth and final.pth
into MODEL_DIR; TensorBoard's events, log.csv and settings.json into LOG_DIR.
The recipe is the paper's, as the 2019 code ran it. Shapes: b images, n
classes, H x W pixels.
"""
if __name__ == '__main__':      # before torch, whose import takes seconds
    from lib import signals
    signals.end_while_starting(is_run=True)

import copy
import functools
import itertools
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

import dataset
import eval
import heads
import network
import settings
import utils
from lib import checkpoint, distributed, run, visualize, wandb_log
from lib.images import read_classes
from lib.inference import check_memory, fit_grid
from lib.logger import Logger
from lib.optimizer import build_optimizer, param_groups, set_learning_rate
from lib.pretrained import load_initial_weights
from utils import UserError

VAL_IMAGES = 4               # of the validation split that TensorBoard shows


# ------------------------------------------------- loss
def segmentation_loss(logits, label, weight=None):
    """Return the mean cross-entropy, with LOSS=ohem of hard pixels alone.

    Void pixels have no loss but stay in the denominator, as in the 2019 code;
    OHEM averages over the hard pixels of an image, then over the images.
    (reduction='mean' has no deterministic kernel on CUDA.)

    Args:
        logits: (b, n, H, W).
        label: (b, H, W), class indices and IGNORE_LABEL.
        weight: (n,) of the classes, or None.
    """
    label = label.long()
    loss = F.cross_entropy(network.to_float32(logits), label, reduction='none',
                           ignore_index=settings.IGNORE_LABEL,
                           label_smoothing=settings.LABEL_SMOOTHING)
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
    pixel is among the OHEM_MIN_KEPT share of its image that is hardest.

    Source: online hard example mining (Shrivastava et al., CVPR 2016), of
    pixels as the field has it. Differs: by image, not by batch, so that the
    loss does not depend on how a batch is split.
    """
    flat = loss.detach().flatten(1)                             # (b, H * W)
    n_kept = max(1, int(settings.OHEM_MIN_KEPT * flat.shape[1]))
    bound = flat.topk(n_kept).values[:, -1:].clamp(
        max=-math.log(settings.OHEM_THRESHOLD))
    hard = (flat >= bound).view(loss.shape)
    return hard & (label != settings.IGNORE_LABEL)


def class_weights(data, device):
    """Return the weights of the classes in the loss, (n,), None for equal.

    With BALANCE_CLASSES: 1 / ln(1.02 + a class's share of the labelled
    pixels), scaled so that a pixel weighs 1 on average. Source: Paszke et
    al., "ENet" (arXiv 1606.02147), section 5.2.
    """
    weight = torch.tensor(settings.CLASS_WEIGHTS)
    if settings.BALANCE_CLASSES:
        counts = distributed.gather(None if utils.rank() else
                                    data.class_pixels().tolist())[0]
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        weight = 1 / torch.log(1.02 + share)
        weight = (weight / (weight * share).sum()).float()
        utils.log('class weights: ' + ' '.join(
            f'{x:.3g}' for x in weight.tolist()))
    return weight.to(device) if len(weight) else None


# ------------------------------------------------- one step
def amp_dtype(device):
    """Return the type that AMP runs convolutions in, None for float32."""
    if settings.AMP == 'auto':
        is_native = device.type == 'cuda' and torch.cuda.is_bf16_supported(
            including_emulation=False)
        return torch.bfloat16 if is_native else None
    return {'off': None, 'bf16': torch.bfloat16,
            'fp16': torch.float16}[settings.AMP]


def memory_format(device):
    """Return the fastest layout of a step: channels last, but contiguous in
    float32 on a CPU."""
    is_plain = device.type == 'cpu' and amp_dtype(device) is None
    return torch.contiguous_format if is_plain else torch.channels_last


def forward_loss(model, image, label, weight, amp):
    """Return the loss of a micro-batch, image (b, 3, H, W) and label (b, H,
    W); weight: of the classes; amp: of amp_dtype."""
    with torch.autocast(image.device.type, amp, enabled=amp is not None):
        logits = model(image)                               # (b, n, H, W)
    return segmentation_loss(logits, label, weight)


@functools.cache
def compiled_loss():
    """Return forward_loss through torch.compile, network and loss in one."""
    return torch.compile(forward_loss)


def backward(model, batches, scaler, device, weight):
    """Accumulate the gradients of a step's ACCUM micro-batches; return (its
    loss, a scalar on the device, the images' IDs). weight: of the classes."""
    loss, ids, amp = torch.zeros((), device=device), [], amp_dtype(device)
    compute = compiled_loss() if settings.COMPILE else forward_loss
    for micro in range(settings.ACCUM):
        image, label, names = next(batches)         # (b, 3, H, W), (b, H, W)
        image = dataset.normalise(image, device).contiguous(
            memory_format=memory_format(device))
        with distributed.skip_sync(model, micro < settings.ACCUM - 1):
            micro_loss = compute(model, image, label, weight,
                                 amp) / settings.ACCUM
            scaler.scale(micro_loss).backward()
        loss, ids = loss + micro_loss.detach(), [*ids, *names]
    return loss, ids


def step_metrics(net, loss, optimizer, scaler):
    """Return {name: scalar on the device} of a step: its loss, the norm of
    its gradient, which CLIP_GRAD then limits, what an EMA unit recorded."""
    scaler.unscale_(optimizer)
    params = [p for p in net.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(p.grad for p in params)
    if settings.CLIP_GRAD:
        torch.nn.utils.clip_grads_with_norm_(params, settings.CLIP_GRAD, norm)
    return {'loss': loss, 'grad_norm': norm, **{
        f'EM/{name}': value for unit in network.ema_units(net)
        for name, value in unit.metrics.items()}}


def log_steps(rows, speed, logger, bar):
    """Record the metrics of steps [(step, {name: float})] and show the
    last; speed: images/s."""
    for step, metrics in rows:
        logger.log_metrics(step, **metrics, images_per_s=speed)
    last = rows[-1][1]
    bar.set_postfix(loss=f'{last["loss"]:.3f}', lr=f'{last["lr"]:.2e}',
                    images_s=f'{speed:.1f}', refresh=False)


# ------------------------------------------------- before the first step
def check_run(processes):
    """Return the settings' network on the meta device. Raise UserError or
    RunError for what no run of so many processes can do; warn of a crop that
    does not fit the grid."""
    s = settings
    settings.validate(for_training=True)
    if s.BATCH_SIZE % (s.ACCUM * processes):
        raise UserError(f'BATCH_SIZE={s.BATCH_SIZE} does not divide into '
                        f'{processes} processes with ACCUM={s.ACCUM} '
                        f'micro-batches each; change one of them (DEVICES)')
    with torch.device('meta'):
        net = heads.build_network()
    if s.INIT_FROM:
        checkpoint.find_checkpoint(s.INIT_FROM)
    if s.COMPILE:
        utils.check_compiler('COMPILE=True')
    if s.WANDB:
        wandb_log.check()
    settings.validate(for_training=True)    # what build_network has completed
    if not net.extractor.can_train_alone and s.BATCH_SIZE < 2 * s.ACCUM:
        raise UserError(f'BACKBONE={s.BACKBONE} with BATCH_SIZE={s.BATCH_SIZE}'
                        f' and ACCUM={s.ACCUM}: it needs at least 2 images at '
                        f'a time, for its batch norm')
    if fit_grid(s.CROP_SIZE) != s.CROP_SIZE:
        utils.log(f'warning: CROP_SIZE={s.CROP_SIZE} does not fit the '
                  f"backbone's grid, so that training and evaluation see "
                  f'different ones; use {fit_grid(s.CROP_SIZE) - s.STRIDE}')
    run.check_folders()
    return net


def open_data(device):
    """Return the training and the validation split ('' for none), every label
    read. Raises UserError where images are in both, unless ALLOW_OVERLAP,
    where there are fewer than a batch, and where one is too large to be
    validated."""
    s = settings
    train_set = dataset.Segmentation(s.TRAIN_SPLIT, train=True)
    val_set = s.VAL_SPLIT and dataset.Segmentation(s.VAL_SPLIT, train=False)
    if len(train_set) < s.BATCH_SIZE:
        raise UserError(f'BATCH_SIZE={s.BATCH_SIZE}, but {s.TRAIN_SPLIT} has '
                        f'{utils.plural(len(train_set), "image")}; make the '
                        f'batch smaller')
    both = sorted({*train_set.ids} & {*(val_set and val_set.ids)})
    if both and not s.ALLOW_OVERLAP:
        raise UserError(f'{utils.plural(len(both), "image")} of '
                        f'{s.VAL_SPLIT} are in {s.TRAIN_SPLIT} too, such as '
                        f'{both[0]}: their score would say nothing. Set '
                        f'VAL_SPLIT= for no validation, or '
                        f'ALLOW_OVERLAP=True')
    if not distributed.is_spawned():            # whose parent has done this
        eval.check_labels(train_set)
        if val_set:
            eval.check_labels(val_set)
            largest = max(val_set.image_sizes(), key=math.prod)
            check_memory((1, 3, *largest), device, s.EVAL_SCALES)
    return train_set, val_set


def log_start(net, train_set, val_set, device):
    """Say what will be trained; warn where a step is estimated to need more
    memory than there is. net: on the meta device."""
    run.log_start(net, train_set, val_set, device)
    net.extractor.recompute = settings.RECOMPUTE
    run.warn_of_memory(net, segmentation_loss, amp_dtype(device), device)


def build(device, is_new):
    """Return (net, optimizer, loss scaler, averaged net or None), on the
    device; is_new: load the weights to start from."""
    s = settings
    utils.seed_everything(s.SEED, s.DETERMINISTIC)
    net = heads.build_network()
    if is_new:
        load_initial_weights(net)
    if s.FREEZE == 'backbone':
        net.extractor.requires_grad_(False)
    for unit in network.ema_units(net):
        unit.accum = s.ACCUM
    net.to(device, memory_format=memory_format(device))
    if utils.world() > 1:
        net = distributed.sync_batch_norm(net)
    net.extractor.recompute = s.RECOMPUTE
    optimizer = build_optimizer(param_groups(net))
    scaler = torch.amp.GradScaler(
        device.type, enabled=amp_dtype(device) is torch.float16)
    average = copy.deepcopy(net, {id(each): each for each in net.buffers()}
                            ).requires_grad_(False) if s.AVERAGE else None
    torch.manual_seed(s.SEED + utils.rank())    # dropout's, a process each
    return net, optimizer, scaler, average


@torch.no_grad()
def update_average(average, net, step):
    """Move the averaged net's parameters towards the net's; after the first
    step they are equal. Buffers are the net's own."""
    update = get_ema_multi_avg_fn(settings.AVERAGE if step > 1 else 0)
    update([*average.parameters()], [*net.parameters()], None)


def set_train_mode(net):
    """Put the net into training mode, but for statistics that are frozen."""
    net.train()
    if settings.FREEZE == 'backbone':
        net.extractor.eval()
    elif settings.FREEZE == 'bn':
        for part in net.extractor.modules():
            if isinstance(part, _BatchNorm):
                part.eval()


# ------------------------------------------------- validation
def validate(nets, data, step, logger):
    """Evaluate nets {name of the metric: net}, the split shared by all
    processes; return {name: value} of mIoU and each class's IoU. Images go to
    the logger; the first net is put back into training mode."""
    names, _ = read_classes(data.root, data.n_classes)
    metrics, confusions = {}, []
    with torch.compiler.set_stance('force_eager'), utils.without_search():
        for metric, net in nets.items():
            confusion, loss = eval.measure(net, data)
            confusions.append(confusion)
            metrics[metric.replace('mIoU', 'loss')] = loss
            scores = utils.scores(confusions[-1], settings.EVAL_CLASSES)
            metrics[metric] = scores['mIoU']
            metrics.update({
                f'{metric.replace("val_mIoU", key)}/{name}': value
                for key in utils.PER_CLASS
                for name, value in zip(names, scores[key])
                if value is not None})
            utils.log(f'step {step}: {metric.replace("_", " ")} '
                      f'{100 * scores["mIoU"]:.2f} %')
        net = nets['val_mIoU']
        logger.add_images(step, validation_images(net, data, confusions[0]))
    set_train_mode(net)
    return metrics


@torch.no_grad()
def validation_images(net, data, confusion):
    """Yield (name, page (H, W, 3) uint8) for TensorBoard: label, prediction
    and error of VAL_IMAGES evenly spaced images, the attention maps of an EMA
    unit and where each image's centre attends, and the confusion matrix."""
    device, run = eval.get_device(net), eval.prepare_network(net)
    names, colours = read_classes(data.root, data.n_classes)
    for i in np.unique(np.linspace(0, len(data) - 1, VAL_IMAGES).astype(int)):
        image, label = data.read(i)                 # (H, W, 3), (H, W)
        x = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
        pred = eval.predict_classes(run, dataset.normalise(x, device),
                                    settings.EVAL_SCALES, settings.EVAL_FLIP)
        yield f'Val/{data.ids[i]}', visualize.draw_sample(
            image, label, pred[0].cpu().numpy(), names, colours)
        if network.ema_units(net):
            yield f'ValBases/{data.ids[i]}', visualize.draw_attention(
                image, *eval.attention_maps(net, image, device))
            if settings.EM_NORM != 'layer':     # which implies none
                query = image.shape[1] // 2, image.shape[0] // 2
                yield f'ValQuery/{data.ids[i]}', visualize.draw_query(
                    image, query, *eval.query_attention(net, image, device,
                                                        query))
    yield 'ValConfusion', visualize.plot_confusion(confusion, names)


# ------------------------------------------------- the run
def parse_arguments():
    """Set the settings that the command line gives."""
    parser = utils.make_parser(__doc__, settings.describe())
    settings.override_all(parser.parse_known_args()[1])


def main():
    s, stop = settings, distributed.StopRequest()
    parse_arguments()

    # whatever can fail is tried before the first step, what is cheap first
    devices = distributed.pick_devices(s.DEVICES)
    sketch = check_run(utils.world() if utils.is_launched() else len(devices))
    latest = os.path.join(s.MODEL_DIR, 'latest.pth')
    state = run.read_latest(latest)
    if state and run.is_finished(state):
        return
    train_set, val_set = open_data(devices[0])
    device = distributed.join(devices)
    log_start(sketch, train_set, val_set, device)

    # network, optimizer, and where they continue from
    is_resumed = distributed.assert_agreed(bool(state), f'{latest} is there')
    net, optimizer, scaler, average = build(device, is_new=not is_resumed)
    _locks = run.lock_folders()         # held until main ends
    nets = {'val_mIoU': net}
    parts = {'net': net, 'optimizer': optimizer, 'scaler': scaler}
    if average:
        parts['average'] = nets['val_mIoU_average'] = average
    start, best = run.restore(state, parts, latest) if state else (0, 0.0)
    model, weight = distributed.wrap_ddp(net), class_weights(train_set, device)
    batches = dataset.to_device(dataset.train_loader(
        train_set, start, utils.rank(), utils.world(), utils.progress), device)
    batches = itertools.chain([*itertools.islice(batches, 1)], batches)
    logger = Logger(s.LOG_DIR, start)
    logger.log_settings(s.as_dict())
    writer = run.CheckpointWriter(parts)
    step, pending, read_every = start, [], 1 if device.type == 'cpu' else 10
    bar = utils.progress(total=s.ITER_MAX, initial=start, desc='train',
                         unit='step')
    set_train_mode(net)
    stop.begin()
    began = time.perf_counter()
    for step in range(start + 1, s.ITER_MAX + 1):
        lr = set_learning_rate(optimizer, step)
        loss, ids = backward(model, batches, scaler, device, weight)
        pending.append((step, ids, lr, step_metrics(net, loss, optimizer,
                                                    scaler)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average:
            update_average(average, net, step)
        bar.update()

        is_last, is_best = step == s.ITER_MAX, False
        validates = val_set and (is_last
                                 or s.ITER_VAL and step % s.ITER_VAL == 0)
        saves = is_last or step % max(1, s.ITER_SAVE // 10) == 0
        keeps = step % s.ITER_SAVE == 0
        if not (validates or saves or keeps or step % read_every == 0):
            continue                    # without waiting for the device
        rows, is_stopping = run.read_metrics(pending, stop or logger.error)
        if validates or saves or keeps or is_stopping:
            run.check_finite(parts, step)
        speed = s.BATCH_SIZE * len(rows) / (time.perf_counter() - began)
        if validates:
            writer.save('latest.pth', step, best, for_resume=True)
            writer.wait()               # whatever comes of the validation
            rows[-1][1].update(validate(nets, val_set, step, logger))
            is_best = rows[-1][1]['val_mIoU'] > best
            best = max(best, rows[-1][1]['val_mIoU'])
        log_steps(rows, speed, logger, bar)
        if is_best:
            writer.save('best.pth', step, best)
        if saves or is_stopping:
            writer.save('latest.pth', step, best, for_resume=True)
        if keeps:
            writer.save(f'step_{step}.pth', step, best, for_resume=True)
        if is_stopping and not is_last:
            writer.wait()
            bar.close()
            logger.close()
            utils.log(run.describe_stop(step, stop.name))
            distributed.leave(utils.STOPPED)
        began = time.perf_counter()

    writer.save('final.pth', step, best)
    writer.wait()
    bar.close()
    logger.close()
    utils.log(run.describe_end(step, best if val_set else None))
    distributed.leave(0)


if __name__ == '__main__':
    utils.run_main(main)
