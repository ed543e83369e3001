"""The watcher: a dispatch mode under which a model is built and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightsync.errors import LayoutError
from weightsync.integrations.recording.fills import fills_of, whole_fill
from weightsync.integrations.recording.resolve import carry, pieces_of
from weightsync.integrations.recording.writes import Copy, Dim, Fill, Recorded, Storage, Write

__all__ = ["Recorder"]

_aten = torch.ops.aten
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_ONES = {_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default}
_FULL = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.new_full.default: 2}
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh_copy.default}
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a model being built and loaded on the meta device. Context manager.

    Build the model inside, then pass tensors of `source` to its loader, then ask `recorded`. Only
    this thread is watched. Cost: some 30 us for each operation of the loader.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, Storage] = {}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def source(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Makes a canonical tensor to give to the loader; it has no storage.

        Args:
            name: Canonical name.
            shape: Unsharded shape.
            dtype: Dtype that the loader sees.

        Returns:
            A tensor on the meta device.
        """
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        storage = self._new(tensor)
        storage.tensor = name
        return tensor

    def recorded(self, parameter: Tensor) -> Recorded:
        """Tells what was copied into a tensor that was made while recording.

        Args:
            parameter: A tensor on the meta device.

        Returns:
            Its content; not loaded if the loader did not write to it.

        Raises:
            LayoutError: It is no dense tensor that begins its storage; or the loader did what
                cannot be expressed as strided copies.
        """
        shape = tuple(parameter.shape)
        storage = self._storages.get(_identity(parameter))
        if storage is None or not (storage.holds_weights or storage.is_loaded):
            fills = whole_fill(storage, shape)
            return Recorded(shape, parameter.dtype, (), fills, is_loaded=False)
        if not parameter.is_contiguous() or parameter.storage_offset() != 0:
            raise LayoutError(
                f"a parameter of shape {shape} and strides {parameter.stride()} is no dense "
                "tensor; this engine cannot be recorded"
            )
        if storage.numel != parameter.numel() or storage.dtype != parameter.dtype:
            raise LayoutError(
                f"a parameter of shape {tuple(parameter.shape)} is a part of a larger tensor or "
                "seen under another dtype; this engine cannot be recorded"
            )
        pieces = tuple(pieces_of(storage))
        fills = tuple(fills_of(storage, shape, pieces))
        return Recorded(shape, parameter.dtype, pieces, fills, is_loaded=True)

    # ---- watching ----

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.copy_.default and args[0].device.type == "meta":
            self._copy(args[0], args[1])
            return args[0]
        if func in _FILLS and args[0].device.type == "meta":
            self._fill(args[0], float(args[1]) if len(args) > 1 else 0.0)
            return args[0]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._refuse_unless_plain(func, inputs)
        result = func(*args, **kwargs)
        known = {_identity(tensor) for tensor in inputs}
        for out in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if out.device.type != "meta" or _identity(out) in known:
                continue  # a real tensor of the engine's own, or a view
            storage = self._new(out)
            if func in _ZEROS:
                storage.background = 0.0
            elif func in _ONES:
                storage.background = 1.0
            elif func in _FULL:
                storage.background = float(args[_FULL[func]])
            elif func in _COPIES:
                self._copy(out, args[0])
            elif func in (_aten.cat.default, _aten.stack.default):
                self._join(out, args, kwargs, is_stack=func is _aten.stack.default)
            elif any(self._holds_weights(tensor) for tensor in inputs):
                raise self._refusal(func, inputs)
        return result

    def _refuse_unless_plain(self, func: Any, inputs: Sequence[Tensor]) -> None:
        """Refuses what would change weights or parameters in a way that is not watched."""
        if func._schema.is_mutable and any(
            self._holds_weights(tensor) for tensor in inputs if tensor.device.type == "meta"
        ):
            raise self._refusal(func, inputs)
        if func is _aten._local_scalar_dense.default and self._holds_weights(inputs[0]):
            raise self._refusal(func, inputs)

    def _refusal(self, func: Any, inputs: Sequence[Tensor]) -> LayoutError:
        names = {name for tensor in inputs for name in self._origins(tensor)}
        shown = ", ".join(sorted(names)[:4])
        return LayoutError(
            f"the engine's loader computes {func} on {shown}: only copies, views and casts of "
            "weights can be recorded; this model or quantization cannot be fed by weightsync",
            tensor=sorted(names)[0] if names else None,
        )

    def _origins(self, tensor: Tensor) -> Iterator[str]:
        storage = self._storages.get(_identity(tensor))
        if storage is not None and storage.tensor:
            yield storage.tensor
        elif storage is not None:
            yield from (piece.tensor for write in storage.writes for piece in write.pieces)

    def _holds_weights(self, tensor: Tensor) -> bool:
        storage = self._storages.get(_identity(tensor))
        return storage is not None and storage.holds_weights

    def _new(self, tensor: Tensor) -> Storage:
        identity = _identity(tensor)
        made = Storage(tuple(tensor.shape), tensor.dtype, tensor.untyped_storage())
        self._storages[identity] = made
        return made

    def _join(
        self, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_stack: bool
    ) -> None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        start = 0
        for index, part in enumerate(args[0]):
            if is_stack:
                self._copy(out.select(dim, index), part)
                continue
            if part.numel():
                self._copy(out.narrow(dim, start, part.shape[dim]), part)
                start += part.shape[dim]

    def _copy(self, dst: Tensor, src: Tensor) -> None:
        target, source = self._storages.get(_identity(dst)), self._storages.get(_identity(src))
        if target is None:
            if self._holds_weights(src):
                name = ", ".join(sorted(set(self._origins(src)))[:4])
                raise LayoutError(
                    f"the engine's loader copies {name} into memory that was not made while its "
                    "model was built; this engine cannot be recorded",
                    tensor=name,
                )
            return
        if dst.numel() == 0:
            # Nothing of a weight may be left for this rank; the parameter is loaded all the same.
            target.is_loaded |= source is not None and source.holds_weights
            return
        if source is None or not source.holds_weights:
            known = () if source is None else whole_fill(source, source.shape)
            value = known[0].value if known else _constant_of(src)
            target.writes.append(_constant(dst, value))
            target.is_loaded |= source is not None and source.is_loaded
            return
        self._require_items(dst, target)
        self._require_items(src, source)
        if source.tensor and source.writes:  # the loader overwrote what it was given
            fills = whole_fill(source, source.shape)
            if not fills:
                raise self._refusal(_aten.fill_.Scalar, [src])
            target.writes.append(_constant(dst, fills[0].value))
            target.is_loaded = True  # with a constant: bias that only one rank adds
            return
        self._require_one_cast(dst, src, target, source)
        target.is_converted |= source.is_converted or not _is_exact(source.dtype, target.dtype)
        dims = tuple(
            Dim(n, s, d)
            for n, s, d in zip(dst.shape, src.expand(dst.shape).stride(), dst.stride(), strict=True)
            if n != 1
        )
        copy = Copy(dims, int(src.storage_offset()), int(dst.storage_offset()))
        target.writes.append(carry(copy, source))

    def _fill(self, dst: Tensor, value: float) -> None:
        target = self._storages.get(_identity(dst))
        if target is not None and dst.numel():
            target.writes.append(_constant(dst, value))

    def _require_items(self, tensor: Tensor, storage: Storage) -> None:
        if tensor.dtype.itemsize != storage.dtype.itemsize:
            name = ", ".join(sorted(set(self._origins(tensor)))[:4]) or "a parameter"
            raise LayoutError(
                f"the engine's loader sees {name} as {tensor.dtype} instead of {storage.dtype}, "
                "whose elements have another size; this cannot be recorded",
                tensor=name,
            )

    def _require_one_cast(self, dst: Tensor, src: Tensor, target: Storage, source: Storage) -> None:
        """A chain of copies must end in what one cast from the canonical dtype makes."""
        if source.is_converted and source.dtype != target.dtype:
            reason = "only one rounding can be expressed"
        elif src.dtype != dst.dtype and (src.dtype, dst.dtype) != (source.dtype, target.dtype):
            reason = f"it casts {src.dtype}, a view, to {dst.dtype}; this cannot be expressed"
        else:
            return
        name = ", ".join(sorted(set(self._origins(src)))[:4])
        raise LayoutError(
            f"the engine's loader brings {name} as {source.dtype} to {target.dtype}: {reason}",
            tensor=name,
        )


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _constant(dst: Tensor, value: float | None) -> Write:
    """A write of one value, or of what nobody knows."""
    dims = tuple((n, d) for n, d in zip(dst.shape, dst.stride(), strict=True) if n != 1)
    offset = int(dst.storage_offset())
    if value is None:
        return Write(offset, dims)
    n, stride = (tuple(axis) for axis in zip(*dims, strict=True)) if dims else ((), ())
    return Write(offset, dims, fills=(Fill(offset, n, stride, value),))


def _constant_of(tensor: Tensor) -> float | None:
    """The value of a real tensor that holds one number everywhere, else None."""
    if tensor.device.type == "meta" or not tensor.numel():
        return None
    first = tensor.flatten()[0]
    return float(first) if bool((tensor == first).all()) else None


def _is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast loses nothing. Between formats of one byte nothing is known to."""
    if source == target:
        return True
    floats = source.is_floating_point and target.is_floating_point
    wide = min(source.itemsize, target.itemsize) > 1
    return floats and wide and torch.promote_types(source, target) == target
