"""The optimizer, its groups of parameters, its state; the learning rate."""
import math

import torch

import settings
from utils import poly_lr


def param_groups(net):
    """Return the optimizer's three groups: weights of convolutions (decayed),
    the weights of batch norm and learned bases, and all biases (with SGD twice
    the learning rate). Frozen parameters are in none. Where BACKBONE_LR is not
    1, the backbone has three of its own. 'lr_factor' multiplies the learning
    rate."""
    s, backbone = settings, {id(p) for p in net.extractor.parameters()}
    bias_factor = 2 if s.OPTIMIZER == 'sgd' else 1
    groups = [{'params': [], 'weight_decay': decay, 'lr_factor': part * factor}
              for part in ((1,) if s.BACKBONE_LR == 1 else (1, s.BACKBONE_LR))
              for decay, factor in ((s.WEIGHT_DECAY, 1), (0.0, 1),
                                    (0.0, bias_factor))]
    for module in net.modules():
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            kind = (2 if name.endswith('bias') else
                    0 if name.endswith('weight') and param.ndim > 1 else 1)
            is_own = len(groups) > 3 and id(param) in backbone
            groups[kind + 3 * is_own]['params'].append(param)
    return [group for i, group in enumerate(groups)
            if i < 3 or group['params']]


def build_optimizer(groups):
    """Return SGD or AdamW, as OPTIMIZER says, for groups of parameters;
    LR_MOM is the momentum, or the first of AdamW's betas."""
    s = settings
    if s.OPTIMIZER == 'adamw':
        optimizer = torch.optim.AdamW(groups, s.LR, (s.LR_MOM, 0.999),
                                      fused=True)
    else:
        optimizer = torch.optim.SGD(groups, s.LR, s.LR_MOM, fused=True)
    prepare_state(optimizer)
    return optimizer


def prepare_state(optimizer):
    """Lay out in memory what an optimizer keeps of each parameter as the
    parameter is. A checkpoint's lies as on the device where it was written: a
    fused optimizer would pair wrong numbers. SGD's momentum starts with zeros,
    which it would leave uninitialised in a first step that overflows."""
    for group in optimizer.param_groups:
        for param in group['params']:
            state = optimizer.state[param]
            if group.get('momentum') and state.get('momentum_buffer') is None:
                state['momentum_buffer'] = torch.zeros_like(param)
            for name, value in state.items():
                if (value is not None and value.shape == param.shape
                        and value.stride() != param.stride()):
                    state[name] = torch.empty_like(param).copy_(value)


def learning_rate(step):
    """Return the learning rate of a step, counted from 1: SCHEDULE's, risen
    to linearly during the first WARMUP steps."""
    s = settings
    if s.SCHEDULE == 'cosine':
        lr = s.LR * (1 + math.cos(math.pi * (step - 1) / s.ITER_MAX)) / 2
    else:
        lr = poly_lr(step, s.LR, s.ITER_MAX, s.POLY_POWER, s.LR_DECAY)
    return lr * min(1, step / s.WARMUP) if s.WARMUP else lr


def set_learning_rate(optimizer, step):
    """Set the learning rate of a step, counted from 1, and return it."""
    lr = learning_rate(step)
    for group in optimizer.param_groups:
        group['lr'] = lr * group['lr_factor']
    return lr
