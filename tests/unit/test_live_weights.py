"""How a source watches its tensors: changes are seen, what is the same is not described anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from weightsync.errors import LayoutError, WeightSyncError
from weightsync.live.weights import SourceWeights


def mapping() -> dict[str, torch.Tensor]:
    return {"b": torch.zeros(6, 4), "a": torch.zeros(3), "empty": torch.zeros(0)}


def watched(weights: nn.Module | dict[str, torch.Tensor]) -> SourceWeights:
    held = SourceWeights(weights, layout=None, rank=0, dtype=None)
    held.prepare()
    return held


def test_addresses_are_in_the_order_of_the_manifest() -> None:
    weights = mapping()
    held = watched(weights)
    names = held.manifest.buffers.names
    assert sorted(names) == ["a", "b"]
    for _ in range(2):
        assert held.addresses().tolist() == [weights[name].data_ptr() for name in names]
        held.prepare()
    weights["b"] = torch.ones(6, 4)  # another object, elsewhere: found without prepare, and with
    for _ in range(2):
        assert held.addresses().tolist() == [weights[name].data_ptr() for name in names]
        held.prepare()


def test_writes_and_replacements_are_seen() -> None:
    weights = mapping()
    held = watched(weights)
    before = held.fingerprint()
    assert held.changed_since(before) is None
    weights["b"].view(-1)[3] = 1.0  # through a view
    assert held.changed_since(before) == "b"
    before = held.fingerprint()
    weights["a"] = weights["a"].clone()
    assert held.changed_since(before) == "a"
    before = held.fingerprint()
    del weights["a"]
    assert held.changed_since(before) == "a"


def test_a_write_between_prepare_and_fingerprint_is_seen() -> None:
    weights = mapping()
    held = watched(weights)
    weights["a"].add_(1)
    assert held.changed_since(held.fingerprint()) == "a"
    assert held.changed_since(held.fingerprint()) is None  # the second one looks again


def test_an_optimizer_step_is_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    held = watched(model)
    optimizer = torch.optim.AdamW(model.parameters())
    before = held.fingerprint()
    model(torch.ones(4)).sum().backward()
    assert held.changed_since(before) is None
    optimizer.step()
    assert held.changed_since(before) == "0.weight"


def test_inference_tensors_do_not_count_writes() -> None:
    with torch.inference_mode():
        weights = {"a": torch.zeros(3)}
    held = watched(weights)
    assert held.changed_since(held.fingerprint()) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.update(b=torch.zeros(6, 5)),
        lambda w: w.update(b=torch.zeros(4, 6).t()),
        lambda w: w.update(b=torch.zeros(6, 4, dtype=torch.float16)),
        lambda w: w["b"].t_(),  # the same object in the same place
        lambda w: w["b"].resize_(3, 4),
        lambda w: setattr(w["b"], "data", w["b"].view(4, 6)),
    ],
)
def test_another_layout_is_refused(change: object) -> None:
    weights = mapping()
    held = watched(weights)
    assert callable(change)
    change(weights)
    with pytest.raises(LayoutError, match="b is not what it was"):
        held.prepare()


def test_tensors_that_come_or_go_are_refused() -> None:
    for name in ("a", "c"):
        weights = mapping()
        held = watched(weights)
        if name in weights:
            del weights[name]
        else:
            weights[name] = torch.zeros(2)
        with pytest.raises(WeightSyncError, match=name):
            held.prepare()


def test_tied_weights_are_one_buffer() -> None:
    tensor = torch.zeros(5, 3)
    weights = {"embed": tensor, "head": tensor, "norm": torch.zeros(3)}
    held = watched(weights)
    assert len(held.addresses()) == 2
    assert set(held.addresses().tolist()) == {tensor.data_ptr(), weights["norm"].data_ptr()}
    before = held.fingerprint()
    weights["head"].add_(1)
    assert held.changed_since(before) in ("embed", "head")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_another_cut_of_a_dtensor_is_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    weights = {"w": DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)])}
    held = watched(weights)
    weights["w"] = DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(1)])
    with pytest.raises(LayoutError, match="w is not what it was"):
        held.prepare()


@pytest.mark.usefixtures("process_group")
def test_inference_dtensors_do_not_count_writes() -> None:
    with torch.inference_mode():
        tensor = DTensor.from_local(torch.zeros(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    held = watched({"w": tensor})
    assert held.changed_since(held.fingerprint()) is None


@pytest.mark.usefixtures("process_group")
def test_dtensors_are_watched_by_their_local_memory() -> None:
    mesh = init_device_mesh("cpu", (1,))
    tensor = DTensor.from_local(torch.zeros(4, 2), mesh, [Shard(0)])
    weights: dict[str, torch.Tensor] = {"w": tensor}
    held = watched(weights)
    assert held.addresses().tolist() == [tensor.to_local().data_ptr()]
    before = held.fingerprint()
    assert held.changed_since(before) is None
    tensor.add_(1)
    assert held.changed_since(before) == "w"
    before = held.fingerprint()
    tensor.to_local().add_(1)
    assert held.changed_since(before) == "w"
