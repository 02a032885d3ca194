"""Does torch.compile take network and loss in one graph, and give the same?

    python -m pytest tests/test_compile.py      (--long: with its own compiler)
"""
import copy

import pytest
import torch
import torch._dynamo

import dataset
import eval
import settings
import train
from training import save_network, train_here

HEADS = [{'HEAD': head} for head in settings.choices('HEAD')]
UNITS = [{'EM_KEEP': 'learned'}, {'EM_KEEP': 'fixed', 'EM_NORM': 'layer'},
         {'EM_GRAD': True, 'EM_NORM': 'none'}]
STEPS = [{'RECOMPUTE': True}, {'LOSS': 'ohem'}, {'FREEZE': 'backbone'},
         {'AMP': 'bf16'}, {'CLASS_WEIGHTS': (1., 2., 3., 4., 5., 6.)}]


@pytest.fixture
def graphs(monkeypatch):
    """Have torch.compile refuse what breaks a graph, and not compile it;
    return the list of graphs."""
    found, inner = [], torch.compile

    def count(graph, inputs):
        found.append(graph)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: inner(
        function, backend=count, fullgraph=True, **options))
    torch._dynamo.reset()
    train.compiled_loss.cache_clear()
    yield found
    train.compiled_loss.cache_clear()


def run_steps(net, optimizer, scaler, weight):
    """Train three steps on noise, the second after a validation; return the
    losses."""
    cpu, losses = torch.device('cpu'), []
    train.set_train_mode(net)
    for step in range(3):
        torch.manual_seed(step)
        batches = iter([(torch.randint(0, 256, (2, 3, 33, 33)).byte(),
                         torch.randint(0, 6, (2, 33, 33)).byte(), [])])
        loss, _ = train.backward(net, batches, scaler, cpu, weight)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            with torch.compiler.set_stance('force_eager'), torch.no_grad():
                eval.prepare_network(net)(torch.zeros(1, 3, 49, 33))
            train.set_train_mode(net)
    return losses


@pytest.mark.long
@pytest.mark.parametrize('changes', HEADS + UNITS + STEPS, ids=str)
def test_network_and_loss_are_one_graph(small, graphs, changes):
    """Compiled once for three steps, which equal eager ones."""
    vars(settings).update(DROPOUT=0.0, **changes)
    net, optimizer, scaler, _ = train.build(torch.device('cpu'), is_new=True)
    twin = copy.deepcopy((net, optimizer, scaler))
    weight = torch.tensor(settings.CLASS_WEIGHTS) if (
        settings.CLASS_WEIGHTS) else None
    want = run_steps(*twin, weight)
    assert not graphs
    settings.COMPILE = True
    rel = 0.05 if settings.AMP == 'bf16' else 1e-3
    assert run_steps(net, optimizer, scaler, weight) == pytest.approx(
        want, rel=rel)
    assert len(graphs) == 1
    rel = max(rel, 0.01)
    for (name, a), b in zip(net.named_buffers(), twin[0].buffers()):
        a, b = a.double(), b.double()       # some are counters
        assert (a - b).norm() <= rel * b.norm(), name


@pytest.mark.long
@pytest.mark.parametrize('changes', HEADS, ids=str)
def test_inference_is_compiled_for_ranges_of_sizes(small, graphs, changes):
    """Not for each: torch's convolutions have a few, on a CPU."""
    vars(settings).update(INFERENCE='folded', **changes)
    net = save_network()
    folded, settings.INFERENCE = eval.prepare_network(net), 'compiled'
    compiled = eval.prepare_network(net)
    with torch.no_grad():
        for size in [(81 + 16 * i, 193 - 16 * i) for i in range(8)]:
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(x), folded(x), rtol=1e-3,
                                       atol=1e-4)
    assert len(graphs) <= 4


# ------------------------------------------------- with torch's own backend
@pytest.mark.long
def test_a_compiled_run_is_near_an_eager_one(small, monkeypatch):
    """Training, validation, both by train.py; with RECOMPUTE too."""
    vars(settings).update(DROPOUT=0.0, ITER_MAX=3, ITER_VAL=2, CROP_SIZE=33)
    monkeypatch.setattr(train, 'validation_images', lambda *a: ())
    losses = []
    for changes in ({}, {'COMPILE': True}, {'RECOMPUTE': True}):
        name = f'run{len(losses)}'
        vars(settings).update(changes, MODEL_DIR=name, LOG_DIR=name)
        torch._dynamo.reset()
        train.compiled_loss.cache_clear()
        rows = train_here(monkeypatch)
        losses.append([float(row['loss']) for row in rows.values()])
    assert settings.COMPILE and settings.RECOMPUTE
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.long
def test_compiled_inference_scores_as_folded_does(small):
    net, data = save_network(), dataset.Segmentation('val', train=False)
    found = {}
    for settings.INFERENCE in ('folded', 'compiled'):
        torch._dynamo.reset()
        found[settings.INFERENCE] = eval.evaluate(net, data)
    agree = (found['folded'] - found['compiled']).abs().sum()
    assert agree <= 1e-3 * found['folded'].sum()
