"""What a network costs: multiply-accumulates, activations, parameters,
counted on the meta device where nothing is allocated; memory there is."""
import resource
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class ActivationCounter(TorchDispatchMode):
    """Count the elements of all tensors that operators return, views aside.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(
                x.numel() for x in (out if isinstance(out, tuple) else [out])
                if isinstance(x, torch.Tensor) and x.is_floating_point())
        return out


class TrafficCounter(TorchDispatchMode):
    """Count the operators that compute (views and allocations do not) and the
    bytes of their inputs and outputs, each once an operator."""

    operators = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == 'aten' and not func.is_view and not any(
                word in func.__name__ for word in ('empty', 'view')):
            self.operators += 1
            self.bytes += sum(x.numel() * x.element_size() for x in
                              tree_leaves((args, kwargs, out))
                              if isinstance(x, torch.Tensor))
        return out


def complexity(net, size=(513, 513)):
    """Count what one image of size (H, W) pixels costs.

    The network may be on the meta device.

    Returns: dict(macs, activations, params): multiply-accumulates of
    convolutions and matrix products by torch's counter; elements that
    operators return, in place or not; elements of all parameters.
    """
    parameters = list(net.parameters())
    image = torch.zeros(1, 3, *size, device=parameters[0].device)
    net.eval()
    with (torch.no_grad(), sdpa_kernel(SDPBackend.MATH),
          ActivationCounter() as activations,
          FlopCounterMode(display=False) as flops):
        net(image)
    return {'macs': flops.get_total_flops() // 2,
            'activations': activations.count,
            'params': sum(p.numel() for p in parameters)}


def saved_tensors(forward):
    """Return the tensors that forward() keeps for the backward pass, one for
    each storage."""
    saved = {}

    def pack(x):
        saved.setdefault(x.untyped_storage()._cdata, x)   # held: no reuse
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()          # whose graph holds them
    del result
    return list(saved.values())


def saved_bytes(net, forward):
    """Return the bytes that forward() keeps for the backward pass, the net's
    parameters left out."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    return sum(storage.nbytes() for storage in (
        x.untyped_storage() for x in saved_tensors(forward))
        if storage._cdata not in own)


def training_cost(build, loss, shape, amp=None):
    """Count what the forward and the backward pass of a step cost, nothing
    allocated: on fake CPU tensors, which are meta tensors that autocast takes
    for the CPU's. Attention is counted with its map.

    Args:
        build: function that returns the network.
        loss: of (logits, label), as train.segmentation_loss.
        shape: of the images, (b, 3, H, W).
        amp: type of autocast, None for float32.
    Returns: dict(flop, saved, operators, traffic): FLOP of convolutions and
    matrix products; bytes kept for the backward pass, parameters left out;
    operators that compute; bytes that they read and write.
    """
    def forward():
        with torch.autocast('cpu', amp, enabled=amp is not None):
            logits = net(image)
        losses.append(loss(logits, label))
    with FakeTensorMode():
        net, losses = build().train(), []
        for p in net.parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        image = torch.empty(shape).contiguous(
            memory_format=torch.channels_last)
        label = torch.empty(shape[0], *shape[2:], dtype=torch.uint8)
        with (sdpa_kernel(SDPBackend.MATH), TrafficCounter() as traffic,
              FlopCounterMode(display=False) as flops):
            saved = saved_bytes(net, forward)
            losses[0].backward()
    return {'flop': flops.get_total_flops(), 'saved': saved,
            'operators': traffic.operators, 'traffic': traffic.bytes}


def step_memory(net, loss, shape):
    """Estimate the bytes that a training step takes in float32: activations
    kept for the backward pass; weights, gradients, momentum.

    Args:
        net: on the meta device, where nothing is allocated.
        loss: of (logits, label), as train.segmentation_loss.
        shape: of the images, (b, 3, H, W).
    """
    image = torch.empty(shape, device='meta')
    label = torch.empty(shape[0], *shape[2:], dtype=torch.uint8,
                        device='meta')
    net.train()
    kept = saved_bytes(net, lambda: loss(net(image), label))
    return kept + 12 * sum(p.numel() for p in net.parameters())


def peak_memory(device):
    """Return the peak memory so far, GiB: of tensors on a GPU, since this was
    last asked for; else of the whole process."""
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2 ** 30
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def available_memory():
    """Return the bytes of main memory that can still be taken, by the machine
    and by the container (cgroup); None where the system does not tell."""
    try:
        with open('/proc/meminfo') as file:         # Linux
            fields = dict(line.split(':') for line in file)
        free = int(fields['MemAvailable'].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int(read_text(f'/sys/fs/cgroup/memory.{name}'))
                       for name in ('max', 'current'))
        return min(free, max(0, limit - used))
    except (OSError, ValueError):       # no container, or 'max': no limit
        return free


def read_text(path):
    """Return what a text file holds."""
    with open(path) as file:
        return file.read()
