"""The watcher: a dispatch mode under which a model is built and loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightsync.errors import LayoutError
from weightsync.integrations.recording.fills import fills_of, whole_fill
from weightsync.integrations.recording.resolve import carry
from weightsync.integrations.recording.writes import (
    Copy,
    Dim,
    Fill,
    Recorded,
    Storage,
    dense,
    whole_piece,
)

__all__ = ["Recorder"]

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_ONES = {_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default}
# Which argument is the value.
_FULL = {
    _aten.full.default: 1,
    _aten.full_like.default: 1,
    _aten.new_full.default: 2,
    _aten.scalar_tensor.default: 0,
}
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh_copy.default}
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default}
_COPY_INTO = {_aten.copy_.default, _aten.fill_.Tensor}


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
        storage.is_loaded = True
        storage.shape = n = tuple(shape) or (1,)
        storage.put((0, tuple(zip(n, dense(n), strict=True))), (whole_piece(name, n),))
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
        if storage is None or not storage.is_loaded:
            fills = whole_fill(storage) if storage is not None and storage.shape == shape else ()
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
        fills = tuple(fills_of(replace(storage, shape=shape or (1,))))
        if any(math.isnan(fill.value) for fill in fills):
            raise LayoutError(
                "the engine's loader fills a part of it with values of its own that are no "
                "constant; this cannot be recorded"
            )
        return Recorded(shape, parameter.dtype, tuple(storage.all_pieces), fills, is_loaded=True)

    # ---- watching ----

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COPY_INTO and args[0].device.type == "meta":
            self._copy(args[0], args[1])
            return args[0]
        if func in _FILLS and args[0].device.type == "meta":
            self._fill(args[0], float(args[1]) if len(args) > 1 else 0.0)
            return args[0]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._refuse_unless_plain(func, inputs)
        result = func(*args, **kwargs)
        for tensor in _written(func, args, kwargs):
            if func is _aten.resize_.default:
                self._new(tensor)
            self._fill(tensor, math.nan)
        known = {_identity(tensor) for tensor in inputs}
        for out in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if out.device.type != "meta" or _identity(out) in known:
                continue  # a real tensor of the engine's own, or a view
            self._new(out)
            known.add(_identity(out))
            if func in _COPIES:
                self._copy(out, args[0])
            elif func in (_aten.cat.default, _aten.stack.default):
                self._join(out, args, kwargs, is_stack=func is _aten.stack.default)
            elif func not in _EMPTY:
                if any(self._is_loaded(tensor) for tensor in inputs) and not _is_constant(func):
                    raise self._refusal(func, inputs)
                self._fill(out, _value_of(func, args))
        return result

    def _refuse_unless_plain(self, func: Any, inputs: Sequence[Tensor]) -> None:
        """Refuses what would change weights or parameters in a way that is not watched."""
        if func._schema.is_mutable and any(
            self._is_loaded(tensor) for tensor in inputs if tensor.device.type == "meta"
        ):
            raise self._refusal(func, inputs)
        if func is _aten._local_scalar_dense.default and self._is_loaded(inputs[0]):
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
        if storage is not None:
            yield from (piece.tensor for piece in storage.all_pieces)

    def _is_loaded(self, tensor: Tensor) -> bool:
        storage = self._storages.get(_identity(tensor))
        return storage is not None and storage.is_loaded

    def _new(self, tensor: Tensor) -> Storage:
        made = Storage(_shape_in_memory(tensor), tensor.dtype, tensor.untyped_storage())
        self._storages[_identity(tensor)] = made
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
            if self._is_loaded(src):
                name = ", ".join(sorted(set(self._origins(src)))[:4])
                raise LayoutError(
                    f"the engine's loader copies {name} into memory that was not made while its "
                    "model was built; this engine cannot be recorded",
                    tensor=name,
                )
            return
        # Nothing of a weight may be left for this rank; the parameter is loaded all the same.
        target.is_loaded |= source is not None and source.is_loaded
        if dst.numel() == 0:
            return
        if source is None or not source.is_loaded:
            known = whole_fill(source) if source is not None else ()
            self._fill(dst, known[0].value if known else _constant_of(src))
            return
        self._require_items(dst, target)
        self._require_items(src, source)
        self._require_one_cast(dst, src, target, source)
        target.is_converted |= source.is_converted or not _is_exact(source.dtype, target.dtype)
        dims = tuple(
            Dim(n, s, d)
            for n, s, d in zip(dst.shape, src.expand(dst.shape).stride(), dst.stride(), strict=True)
            if n != 1
        )
        copy = Copy(dims, int(src.storage_offset()), int(dst.storage_offset()))
        pieces, fills = carry(copy, source)
        is_cast = src.dtype == source.dtype and dst.dtype == target.dtype
        rounded = (
            replace(fill, value=_rounded(fill.value, target.dtype if is_cast else None))
            for fill in fills
        )
        target.put(copy.region, pieces, rounded)

    def _fill(self, dst: Tensor, value: float) -> None:
        """Note one value, or NaN for those that nobody knows."""
        target = self._storages.get(_identity(dst))
        if target is None or not dst.numel():
            return
        offset, shape, strides = int(dst.storage_offset()), tuple(dst.shape), dst.stride()
        if dst.dtype == target.dtype:
            value = _rounded(value, dst.dtype)
        elif dst.dtype.itemsize == target.dtype.itemsize:
            value = _rounded(value, None)
        else:
            offset, shape, strides, value = 0, target.shape, dense(target.shape), math.nan
        dims = tuple((n, d) for n, d in zip(shape, strides, strict=True) if n != 1)
        n, stride = (tuple(axis) for axis in zip(*dims, strict=True)) if dims else ((), ())
        target.put((offset, dims), (), [Fill(offset, n, stride, value)])

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
        if any(tensor.is_neg() or tensor.is_conj() for tensor in (dst, src)):
            reason = "a negated view cannot be expressed"
        elif source.is_converted and source.dtype != target.dtype:
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


def _shape_in_memory(tensor: Tensor) -> tuple[int, ...]:
    """Sizes of the dims of a new tensor, widest apart first; one dim if there are gaps."""
    dims = sorted(
        zip(tensor.stride(), tensor.shape, strict=True), key=lambda dim: -dim[0] * (dim[1] > 1)
    )
    numel = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    shape = tuple(n for _, n in dims)
    strides = tuple(stride for stride, n in dims if n != 1)
    whole = tuple(stride for stride, n in zip(dense(shape), shape, strict=True) if n != 1)
    is_dense = math.prod(shape) == numel and strides == whole
    return shape if is_dense and shape else (numel,)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation changes."""
    if not func._schema.is_mutable:
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            leaves = tree_leaves(given)
            yield from (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_meta)


def _is_constant(func: Any) -> bool:
    return func in _ZEROS or func in _ONES or func in _FULL


def _value_of(func: Any, args: tuple[Any, ...]) -> float:
    """What an operation fills the tensor with that it makes; NaN where that is not known."""
    if func in _FULL:
        return float(args[_FULL[func]]) if len(args) > _FULL[func] else math.nan
    return 0.0 if func in _ZEROS else 1.0 if func in _ONES else math.nan


def _constant_of(tensor: Tensor) -> float:
    """The value of a real tensor that holds one number everywhere, else NaN."""
    if tensor.device.type == "meta" or not tensor.numel():
        return math.nan
    first = tensor.flatten()[0]
    return float(first) if bool((tensor == first).all()) else math.nan


def _rounded(value: float, dtype: torch.dtype | None) -> float:
    """A number as a dtype holds it; NaN if it cannot. None: as bits of another type."""
    if dtype is None:
        return 0.0 if value == 0.0 and math.copysign(1.0, value) > 0 else math.nan
    try:
        return float(torch.tensor(value, dtype=dtype, device="cpu").item())
    except (OverflowError, RuntimeError, ValueError):
        return math.nan


def _is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast loses nothing. Between formats of one byte nothing is known to."""
    if source == target:
        return True
    floats = source.is_floating_point and target.is_floating_point
    wide = min(source.itemsize, target.itemsize) > 1
    return floats and wide and torch.promote_types(source, target) == target
