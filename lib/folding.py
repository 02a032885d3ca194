"""Folds batch norm into the convolutions before it, for inference."""
import copy
import functools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import settings
from lib.inference import predict_logits
from utils import log_once

MAX_DIFFERENCE = 1e-4        # of logits, relative to the largest


@torch.no_grad()
def fold_batch_norm(net):
    """Return a copy of the net for inference, channels last, with each batch
    norm folded into the convolution whose output it takes; equal to rounding.

    Which take which is seen in a forward pass of noise, on the CPU in float32.
    A net that would then compute something else, as one that standardises its
    weights, is copied as it is, and the log says so.
    """
    parameter = next(net.parameters())
    folded = copy.deepcopy(net).eval().cpu()
    noise = torch.rand(1, 3, 129, 97, dtype=parameter.dtype,
                       generator=torch.Generator().manual_seed(0))
    want = _fold(folded, noise)
    difference = (predict_logits(folded, noise) - want).abs().max()
    if not difference <= MAX_DIFFERENCE * want.abs().max():
        log_once(f'batch norm of {settings.BACKBONE or settings.HEAD} cannot '
                 f'be folded into its convolutions: the network is run as it '
                 f'is')
        folded = copy.deepcopy(net).eval()
    return folded.to(parameter.device, memory_format=torch.channels_last)


def _fold(net, image):
    """Fold a net's batch norm in place; return its logits of an image."""
    pairs, logits = _find_pairs(net, image)
    for conv_name, norm_name in pairs:
        conv, norm = map(net.get_submodule, (conv_name, norm_name))
        net.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        # batch norm of timm has the activation that follows it
        net.set_submodule(norm_name, getattr(norm, 'act', nn.Identity()))
    return logits


def _find_pairs(net, image):
    """Return ([(name of a convolution, name of the batch norm that takes its
    output)], logits of an image)."""
    made_by, pairs, uses, hooks = {}, [], {}, []

    def note_output(name, module, args, output):
        made_by[id(output)] = name, output          # held: no other has its ID
        uses[name] = uses.get(name, 0) + 1

    def note_input(name, module, args):
        uses[name] = uses.get(name, 0) + 1
        if id(args[0]) in made_by:
            pairs.append((made_by[id(args[0])][0], name))
    for name, part in net.named_modules():
        if isinstance(part, nn.Conv2d):
            hooks.append(part.register_forward_hook(
                functools.partial(note_output, name)))
        elif isinstance(part, _BatchNorm):
            hooks.append(part.register_forward_pre_hook(
                functools.partial(note_input, name)))
    logits = predict_logits(net, image)
    for hook in hooks:
        hook.remove()
    return [(conv, norm) for conv, norm in pairs
            if uses[conv] == uses[norm] == 1], logits
