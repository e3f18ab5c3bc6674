"""The straight-through index: step 0 changes nothing, gradients are the dense relaxation's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import ConversionError
from legocompress.lego.algebra import assemble, join_fragments
from legocompress.lego.module import lego_modules
from legocompress.lego.proxy import assemble_through, balance_gradient, choose_terms, start_proxy
from legocompress.lego.shape import UnitShape
from legocompress.lego.surgery import freeze_indices_, train_indices_
from legocompress.lego.unit import LegoUnit

FORMS = [(1, True), (1, False), (3, True), (3, False)]


def unit(k: int, coefficients: bool, m: int = 7) -> tuple[UnitShape, Tensor, Tensor, Tensor | None]:
    """A unit of random filters whose last fragment is padded; slots name different filters."""
    shape = UnitShape(10, 5, (3, 2), 1, m, 2, k)
    filters = torch.randn(m, shape.width, 3, 2, dtype=torch.float64)
    index = torch.rand(2, 10, m).argsort(2)[:, :, :k].contiguous()
    gains = torch.randn(2, 10, k, dtype=torch.float64) if coefficients else None
    return shape, filters, index, gains


def same_sets(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort(2).values, b.sort(2).values)


@pytest.mark.parametrize(("k", "coefficients"), FORMS)
def test_the_start_chooses_what_the_index_holds(k: int, coefficients: bool) -> None:
    shape, filters, index, gains = unit(k, coefficients)
    filters[3] = -2 * filters[5]  # a double, which the same coefficient would serve as well
    filters[4] = 0
    proxy = start_proxy(shape, LegoUnit(filters, index, gains))
    assert proxy.isfinite().all()
    assert same_sets(proxy.topk(k).indices, index)
    chosen, kept = choose_terms(shape, LegoUnit(filters, index, gains), proxy)
    assert torch.equal(chosen, index)
    assert gains is None or (kept is not None and torch.equal(kept, gains))
    assert torch.equal(
        assemble_through(shape, LegoUnit(filters, index, gains), proxy),
        assemble(shape, LegoUnit(filters, index, gains)),
    )


def test_the_start_is_half_the_distance_to_what_would_come_instead() -> None:
    shape, filters, index, gains = unit(1, True)
    assert gains is not None
    proxy = start_proxy(shape, LegoUnit(filters, index, gains))
    term = gains[0, 4, 0] * filters[index[0, 4, 0]].flatten()
    for b, filter in enumerate(filters.flatten(1)):
        best = (term @ filter) / (filter @ filter)
        distance = (term - best * filter).square().sum()
        expected = 0.5 * (term @ term) - 0.5 * distance
        torch.testing.assert_close(proxy[0, 4, b], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("k", "coefficients"), FORMS)
def test_gradients_are_those_of_the_dense_relaxation(k: int, coefficients: bool) -> None:
    shape, filters, index, gains = unit(k, coefficients)
    filters.requires_grad_()
    proxy = start_proxy(shape, LegoUnit(filters.detach(), index, gains)).requires_grad_()
    if gains is not None:
        gains.requires_grad_()
    cotangent = torch.randn(10, 5, 3, 2, dtype=torch.float64)
    wanted = [t for t in (filters, proxy, gains) if t is not None]
    through = torch.autograd.grad(
        assemble_through(shape, LegoUnit(filters, index, gains), proxy), wanted, cotangent
    )

    # The relaxation: a dense mask M times candidate coefficients C, both free.
    bank = filters.detach().flatten(1)
    mask = torch.zeros(20, 7, dtype=torch.float64)
    candidates = torch.ones_like(mask)
    for r, slot in enumerate(index.reshape(20, k)):
        mask[r, slot] = 1
        if gains is not None:
            own = gains.detach().reshape(20, k)[r]
            weakest = proxy.detach().reshape(20, 7)[r, slot].argmin()
            out = bank[slot[weakest]]
            for b in range(7):
                candidates[r, b] = own[weakest] * (out @ bank[b]) / (bank[b] @ bank[b])
            candidates[r, slot] = own
    free = [filters.detach().clone().requires_grad_(), mask.requires_grad_()]
    candidates.requires_grad_()
    rows = (free[1] * candidates) @ free[0].flatten(1)
    d_filters, d_mask, d_candidates = torch.autograd.grad(
        join_fragments(shape, rows), [*free, candidates], cotangent
    )
    torch.testing.assert_close(through[0], d_filters)
    torch.testing.assert_close(through[1].reshape(20, 7), d_mask)
    if gains is not None:
        expected = d_candidates.gather(1, index.reshape(20, k)).reshape(2, 10, k)
        torch.testing.assert_close(through[2], expected)


def test_a_filter_that_enters_takes_the_place_of_the_one_that_leaves() -> None:
    shape, filters, index, gains = unit(3, True)
    assert gains is not None
    proxy = start_proxy(shape, LegoUnit(filters, index, gains))
    slot = index[1, 2]
    leaver = int(slot[proxy[1, 2, slot].argmin()])
    place = int((slot == leaver).nonzero())
    newcomer = next(b for b in range(7) if b not in slot)
    proxy[1, 2, newcomer] = proxy.max() + 1
    chosen, kept = choose_terms(shape, LegoUnit(filters, index, gains), proxy)
    expected = index.clone()
    expected[1, 2, place] = newcomer
    assert torch.equal(chosen, expected)
    old, new = filters[leaver].flatten(), filters[newcomer].flatten()
    coefficients = gains.clone()
    coefficients[1, 2, place] *= (old @ new) / (new @ new)
    assert kept is not None
    torch.testing.assert_close(kept, coefficients)


def test_several_may_change_in_a_slot() -> None:
    shape, filters, index, gains = unit(3, True)
    proxy = torch.randn(2, 10, 7, dtype=torch.float64)
    chosen, _ = choose_terms(shape, LegoUnit(filters, index, gains), proxy)
    assert same_sets(chosen, proxy.topk(3).indices)
    stayed = (chosen[..., None] == index[:, :, None, :]).any(3)
    assert torch.equal(chosen[stayed], index[stayed])  # in its old place
    assert not stayed.all()


def test_balance_is_that_of_the_released_code() -> None:
    shape = UnitShape(10, 4, (1, 1), 1, 6, 2, 1)
    index = torch.randint(4, (2, 10, 1))  # filters 4 and 5 are never used
    expected = []
    for b in range(6):
        used = int((index == b).sum())
        low, high = 20 // 6, -(-20 // 6)
        expected.append(-(low - used) if used < low else used - high if used > high else 0)
    assert balance_gradient(shape, index).tolist() == expected


def net(**spec: Any) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1))
    return lego.convert_(model, lego.plan(model, lego.LegoSpec(**{"m": 0.5, "o": 2, **spec})))


@pytest.mark.parametrize(("k", "coefficients"), FORMS)
def test_a_network_computes_the_same_with_and_without_n(k: int, coefficients: bool) -> None:
    model = net(k=k, coefficients=coefficients)
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    frozen = copy.deepcopy(model)
    train_indices_(model)
    assert torch.equal(model(x), before)
    gradients = []
    for network in (frozen, model):
        network(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if "proxy" not in n})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)
    freeze_indices_(model)
    assert torch.equal(model(x), before)
    assert not any("proxy" in name for name in model.state_dict())


def test_n_learns_to_choose_the_right_filter() -> None:
    model = nn.Conv2d(4, 8, 1, bias=False)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=1, only=("",))))
    (_, module), *_ = lego_modules(model)
    right = module.index.clone()
    target = module.weight.detach().clone()
    module.index.copy_((right + 1) % 4)
    train_indices_(model)
    start = float((module.weight - target).detach().square().sum())
    optimizer = torch.optim.SGD(
        [p for p in (module.proxy, module.coefficients) if p is not None], 0.2
    )
    for _ in range(300):
        optimizer.zero_grad()
        (module.weight - target).square().sum().backward()
        optimizer.step()
    freeze_indices_(model)
    assert (module.index == right).float().mean() > 0.7
    assert float((module.weight - target).detach().square().sum()) < 0.2 * start


def test_a_network_in_training_is_saved_as_what_it_computes(tmp_path: Any) -> None:
    model = train_indices_(net(k=2))
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        for _, module in lego_modules(model):
            assert module.proxy is not None
            module.proxy.copy_(torch.randn_like(module.proxy))  # no forward pass has seen this
    lego.lego_state(model).source = lego.Source(None, None)  # type: ignore[assignment]
    lego.save(model, tmp_path / "net")
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1))
    again = lego.load(tmp_path / "net", model=fresh)
    torch.testing.assert_close(again(x), model(x), rtol=1e-2, atol=1e-2)  # fp16 coefficients
    for (_, a), (_, b) in zip(lego_modules(again), lego_modules(model), strict=True):
        assert torch.equal(a.index, b.index)


def test_a_slot_that_names_a_filter_twice_is_refused() -> None:
    model = net(k=2)
    (_, module), *_ = lego_modules(model)
    module.index[0, 0] = 1
    with pytest.raises(ConversionError, match="twice"):
        train_indices_(model)


def test_dense_and_copies_forget_n() -> None:
    model = train_indices_(net())
    x = torch.randn(1, 3, 9, 9)
    before = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), before)
    torch.testing.assert_close(lego.to_dense(model)(x), before)


def test_the_plan_tells_what_n_takes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1))
    plan = lego.plan(model, lego.LegoSpec(m=0.5, o=2))
    assert plan.proxy_bytes > 0
    train_indices_(lego.convert_(model, plan))
    proxies = [m.proxy for _, m in lego_modules(model) if m.proxy is not None]
    assert plan.proxy_bytes == sum(4 * p.numel() for p in proxies)
