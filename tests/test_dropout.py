import itertools

import pytest
import torch
from torch import nn

from kv_compression.model.dropout import BlockDropout, Draws, replace_dropout
from tests.test_training import adapted

P = 0.05


def drawn(blocks=range(4), length=150, width=64, seed=0, step=3) -> Draws:
    draws = Draws(width)
    draws.draw(seed, step, blocks, length, torch.device("cpu"))
    return draws


def dropped(draws, number=0, shape=(4, 150, 64), dtype=torch.float32):
    return BlockDropout(P, draws, number)(torch.ones(shape, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_share_is_dropped_and_the_mean_kept(dtype):
    x = torch.randn(4, 1000, 333, dtype=dtype, requires_grad=True)
    out = BlockDropout(P, drawn(length=1000, width=400), 7)(x)
    assert abs((out == 0).double().mean() - P) < 1e-3
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - P), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)
    out.sum().backward()
    assert torch.equal(x.grad == 0, ~kept)
    assert x.grad[kept].unique().numel() == 1


def test_every_place_and_every_module_is_dropped_alike():
    draws = drawn(range(64))
    modules = [dropped(draws, number, (64, 150, 64)).double() for number in range(12)]
    assert all((share.mean() - P).abs() < 2e-3 for share in modules)
    assert (modules[0].mean((0, 1)) - P).abs().max() < 0.012  # by channel: 9,600 draws each, five standard deviations
    assert (modules[0].mean((0, 2)) - P).abs().max() < 0.018
    for one, other in itertools.combinations(modules, 2):
        assert 0.7 * P * P < (one * other).mean() < 1.4 * P * P  # about as often together as by chance


def test_a_draw_is_decided_by_seed_step_and_block():
    there = dropped(drawn([5, 8, 2, 9]))
    assert torch.equal(there, dropped(drawn([5, 8, 2, 9])))
    for changes in ({"seed": 1}, {"step": 4}, {"blocks": [6, 7, 3, 1]}):
        assert not torch.equal(there, dropped(drawn(**{"blocks": [5, 8, 2, 9]} | changes)))
    assert torch.equal(there[2:], dropped(drawn([2, 9]), shape=(2, 150, 64)))  # in another process's batch
    longer = dropped(drawn([5, 8, 2, 9], length=300), shape=(4, 300, 64))  # padded to another length
    assert torch.equal(there, longer[:, :150])
    assert not torch.equal(there, dropped(drawn([5, 8, 2, 9]), number=1))


def test_without_a_draw_or_for_another_shape_it_is_torchs():
    dropout = BlockDropout(P, Draws(8), 0)
    torch.manual_seed(0)
    out = dropout(torch.ones(4, 8))
    torch.manual_seed(0)
    assert torch.equal(out, nn.functional.dropout(torch.ones(4, 8), P))
    dropout.draws = drawn()
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(4, 8)), out)
    x = torch.ones(4, 150, 64)
    assert dropout.eval()(x) is x
    assert torch.equal(BlockDropout(0.0, drawn(), 0)(x), x)


def test_a_models_dropout_is_replaced_and_shares_its_draws():
    model = adapted()
    found = [module for module in model.modules() if isinstance(module, BlockDropout)]
    assert len(found) == 4
    assert all(module.p == P and module.draws is model.draws for module in found)
    assert len({tuple(module.offsets.tolist()) for module in found}) == 4
    assert model.draws.width == 32


def test_modules_share_compiled_code():
    """More of them than torch would compile anew for."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    draws, x = drawn(), torch.randn(4, 150, 64)
    torch._dynamo.reset()
    for number in range(10):
        module = BlockDropout(P, draws, number)
        assert torch.equal(torch.compile(module, backend=count, fullgraph=True)(x), module(x))
    assert len(graphs) == 1


def test_other_modules_are_left_alone():
    holder = nn.ModuleDict({"a": nn.Identity(), "b": nn.Dropout(0.5)})
    replace_dropout([holder], 8)
    assert isinstance(holder["a"], nn.Identity)
    assert isinstance(holder["b"], BlockDropout)
