"""What trains in the demos: a transformers model under FSDP2 over gloo, with real AdamW steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weightsync.demo.model import build_model, text
from weightsync.demo.worker import Message

__all__ = ["FsdpTrainer"]

_BATCH: Final = 4  # sequences per trainer and step
_SEED: Final = 2024


class FsdpTrainer:
    """One rank: the sharded model, its optimizer and its part of the text. Joins the gloo group.

    Args:
        options: `rank` and `world_size`, `folder` where the ranks meet, `timeout_s`.
        config: Of the model, as in config.json.
        lr: Learning rate.
        length: Tokens of a sequence.
        is_random: Learn random tokens of the whole vocabulary, not bytes of a text.
    """

    def __init__(
        self,
        options: Message,
        config: dict[str, Any],
        *,
        lr: float,
        length: int,
        is_random: bool = False,
    ) -> None:
        self.rank, self.world_size = int(options["rank"]), int(options["world_size"])
        dist.init_process_group(
            "gloo",
            init_method=f"file://{options['folder']}/gloo",
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=float(options["timeout_s"])),
        )
        torch.manual_seed(_SEED)  # the same weights everywhere before they are sharded
        self.model: Any = build_model(config, torch.float32)
        mesh = init_device_mesh("cpu", (self.world_size,))
        layers: Any = self.model.get_submodule("model.layers")
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self._length, self._is_random = length, is_random
        self._text = torch.frombuffer(bytearray(text()), dtype=torch.uint8)
        self._random = torch.Generator().manual_seed(_SEED + 1 + self.rank)

    def train(self) -> float:
        """One optimizer step on this rank's share of the batch; the mean loss of all ranks."""
        ids = self._batch()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / self.world_size

    def _batch(self) -> torch.Tensor:
        if self._is_random:
            vocabulary = self.model.get_input_embeddings().num_embeddings
            return torch.randint(vocabulary, (_BATCH, self._length), generator=self._random)
        last = len(self._text) - self._length
        starts = torch.randint(last, (_BATCH,), generator=self._random).tolist()
        return torch.stack([self._text[start : start + self._length] for start in starts]).long()
