"""What is chosen before a plan's rows are made: classes, holders, senders and receivers.

Encode, classify, find boxes, intersect, choose and stamp. Everything up to `stamp` works on one
representative per class of tensors; stamping gives every copy three numbers. From here the rows of
each source rank can be made without those of any other.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final

import numpy as np

from weightsync.errors import LayoutError, UnknownTensorError
from weightsync.ir.encoded import Encoded
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT
from weightsync.ir.plan import MaxTable, PlanOptions, Shares
from weightsync.ir.repeat import find_replicas
from weightsync.ir.tables import BoolArray, IntArray, sum_by, volume_of
from weightsync.planners import choose, encode
from weightsync.planners.classes import TensorClasses, classify
from weightsync.planners.encode import CodeCells
from weightsync.planners.fans import Fans, find_fans, spread
from weightsync.planners.intersect import Boxes, Regions, find_boxes, intersect
from weightsync.planners.sharing import Sharing, Ways, direct_only
from weightsync.planners.stamp import Stamped, stamp

if TYPE_CHECKING:
    from weightsync.planners.replan import PlanMemory

__all__ = ["Inputs", "Outline", "Placement"]

_MAX_LISTED: Final = 8  # names in a message; the error's attributes list all


@dataclasses.dataclass(frozen=True)
class Outline:
    """All choices of a plan, and its copies before they are lowered to rows; made by `of`.

    Copies are made when they are first asked for: whoever has their rows already does not need
    them.

    Attributes:
        inputs: What was known of both sides.
        options: Budgets.
        sink: Merged manifest of all sinks.
        shares: How holders share the work.
        election: Who sends what.
    """

    inputs: Inputs
    options: PlanOptions
    sink: Manifest
    shares: Shares
    election: choose.Election

    @classmethod
    def of(
        cls,
        source: Manifest,
        sink: Manifest,
        options: PlanOptions,
        shares: Shares | None = None,
        memory: PlanMemory | None = None,
    ) -> Outline:
        """Choose; arguments and errors are those of `plan_transfer`."""
        inputs = Inputs.of(source, sink, options, memory)
        if shares is None:
            shares = inputs.shares if inputs.shares is not None else choose.solve(inputs.sets)
        else:
            choose.check_shares(shares, inputs.sets)
        classes, boxes = inputs.classes, inputs.boxes
        like = classes.tensor[classes.first]
        election = choose.elect(
            classes, boxes, inputs.regions, inputs.sets, shares, inputs.encoded.cell(like)
        )
        if len(inputs.encoded.table):
            shapes = inputs.sink.tensors.shape[like]
            election = encode.follow_codes(election, classes, boxes, inputs.cells, shapes)
        made = cls(inputs, options, sink, shares, election)
        if memory is None:  # with one they may not be needed
            _ = made.maxima, made.stamped
        return made

    @functools.cached_property
    def maxima(self) -> MaxTable:
        """Maxima that sources exchange before they encode."""
        inputs = self.inputs
        if not len(inputs.encoded.table):
            return MaxTable.empty()
        return encode.shared_maxima(
            inputs.encoded, inputs.sink, inputs.classes, inputs.boxes, self.election, inputs.cells
        )

    @property
    def num_copies(self) -> int:
        """Copies to one replica before those that several share are split."""
        inputs = self.inputs
        return int(np.diff(inputs.regions.class_start)[inputs.classes.of].sum())

    @property
    def stamped(self) -> Stamped:
        """Copies to one replica, sorted by source rank."""
        return self._copies[0]

    @property
    def pattern(self) -> IntArray:
        """How each copy is passed on: number of the fan among those of its buffer; -1: it is not.

        `(R,)`.
        """
        return self._copies[1]

    @property
    def is_relayed(self) -> BoolArray:
        """Copies that one replica passes on to the others, `(R,)`."""
        return self._copies[2]

    @property
    def fans(self) -> Fans:
        """Where else copies go."""
        return self._copies[3]

    @functools.cached_property
    def _copies(self) -> tuple[Stamped, IntArray, BoolArray, Fans]:
        inputs, sharing = self.inputs, self.inputs.sharing
        classes, max_rows = inputs.classes, self.options.max_rows // inputs.count
        stamped = stamp(classes, inputs.boxes, inputs.regions, self.election, max_rows)
        pattern = np.full(len(stamped.tensor), -1)
        is_relayed = np.zeros(len(stamped.tensor), np.bool_)
        fans = Fans.empty()
        if sharing.is_used:
            cell = inputs.encoded.cell(classes.tensor)
            stamped, place = spread(stamped, sharing, inputs.sink, cell)
            fans, fan = find_fans(stamped, place, sharing, classes, inputs.sink)
            pattern = np.full(len(stamped.tensor), -1)
            if len(fans.buffer):
                pattern = np.where(fan >= 0, fans.pattern[fan], -1)
            is_relayed = sharing.is_relayed[inputs.regions.box[stamped.origin[stamped.region]]]
        return stamped, pattern, is_relayed, fans

    @functools.cached_property
    def pair_bytes(self) -> IntArray:
        """Bytes from each source to each sink of one replica, `(S, ranks)`."""
        stamped, sink = self.stamped, self.inputs.sink
        buffer = sink.pieces.buffer[stamped.dst_piece]
        nbytes = volume_of(stamped.n)[stamped.region] * sink.buffers.itemsize[buffer]
        num_sources, num_sinks = len(self.inputs.encoded.source.ranks), len(sink.ranks)
        pair = stamped.src_rank * num_sinks + sink.buffers.rank[buffer]
        return sum_by(pair, nbytes, num_sources * num_sinks).reshape(num_sources, num_sinks)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What sources hold and what one replica needs of it, matched tensor by tensor.

    All that depends on nothing but the two: not on how many equal replicas there are, nor on
    budgets.

    Attributes:
        source: Merged manifest of all sources.
        sink: Merged manifest of one replica, or of all sinks where they are not alike.
        encoded: What sources make of their values.
        classes, boxes, cells: Of the tensors that the sink wants.
        regions: Overlaps, with the bytes that one replica receives.
    """

    source: Manifest
    sink: Manifest
    encoded: Encoded
    classes: TensorClasses
    boxes: Boxes
    regions: Regions
    cells: CodeCells

    @classmethod
    def of(cls, source: Manifest, sink: Manifest, options: PlanOptions) -> Placement:
        """Match; of the options only `ignore_extra` matters, and only to what is refused."""
        encoded = Encoded.of(source, sink)
        held = encoded.source
        match = _match_tensors(held, sink, options)
        classes = classify(held, sink, match, encoded.table)
        cells = CodeCells.of(classes, encoded, len(sink.tensors))
        boxes = find_boxes(classes, held, sink)
        regions = intersect(classes, boxes, held, sink, encoded)
        return cls(source, sink, encoded, classes, boxes, regions, cells)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both entry points need: what is encoded, classes, boxes, regions and holder sets.

    All of one replica (`sink`) where the manifest says that it repeats it `count` times. `shares`
    are there if they were needed to choose who passes on.
    """

    encoded: Encoded
    classes: TensorClasses
    boxes: Boxes
    regions: Regions
    sharing: Sharing
    sets: choose.HolderSets
    shares: Shares | None
    cells: CodeCells
    sink: Manifest
    count: int

    @classmethod
    def of(
        cls,
        source: Manifest,
        sink: Manifest,
        options: PlanOptions,
        memory: PlanMemory | None = None,
    ) -> Inputs:
        """Find all of it; raises what `plan_transfer` does of manifests."""
        if source.side != "source" or sink.side != "sink":
            raise LayoutError(f"plan from a source to a sink, not {source.side} to {sink.side}")
        if options.relays != "off":
            sink = find_replicas(sink)
        sink, count = sink.repeats or (sink, 1)
        place = Placement.of if memory is None else memory.place
        placed = place(source, sink, options)
        encoded, classes, boxes = placed.encoded, placed.classes, placed.boxes
        regions, cells = placed.regions, placed.cells
        is_scales = cells.is_scales[classes.first]
        common = (encoded, classes, boxes)
        if options.relays != "off" or (options.node_dedup != "off" and options.ranks_per_node > 1):
            ways = Ways(classes, boxes, regions, is_scales, sink, count, options)
            way, _ = ways.best()
            sharing, sets, shares = way.sharing, way.sets, way.shares
            return cls(*common, way.regions, sharing, sets, shares, cells, sink, count)
        regions = dataclasses.replace(regions, nbytes=regions.nbytes * count)
        sets = choose.find_holder_sets(classes, boxes, regions, is_scales)
        sharing = direct_only(boxes, regions, sink)
        return cls(*common, regions, sharing, sets, None, cells, sink, count)


def _match_tensors(source: Manifest, sink: Manifest, options: PlanOptions) -> IntArray:
    """Match tensors by name and shape: the source's number of each sink tensor, `(T_sink,)`."""
    index = source.tensors.index
    numbers = np.array([index.get(name, -1) for name in sink.tensors.names], np.int64)
    wanted = np.zeros(len(numbers), np.bool_)
    wanted[sink.pieces.tensor[sink.pieces.tensor != CONSTANT]] = True
    missing = [sink.tensors.names[t] for t in np.flatnonzero(wanted & (numbers < 0))]
    extra = sorted(set(source.tensors.names) - set(sink.tensors.names) - set(options.ignore_extra))
    if missing or extra:
        raise UnknownTensorError(
            "the two sides do not name the same tensors; "
            f"missing on the source: {_listed(missing)}; "
            f"extra on the source, wanted by no sink: {_listed(extra)}; "
            "check the layouts' model, or list known extras in PlanOptions.ignore_extra",
            missing=missing,
            extra=extra,
        )
    known = np.flatnonzero(numbers >= 0)
    src_shape, dst_shape = source.tensors.shape[numbers[known]], sink.tensors.shape[known]
    differs = (src_shape != dst_shape).any(axis=1)
    differs |= source.tensors.ndim[numbers[known]] != sink.tensors.ndim[known]
    for row in np.flatnonzero(differs)[:1]:
        name = sink.tensors.names[known[row]]
        shapes = [
            tuple(side.tensors.shape[t, -int(side.tensors.ndim[t]) :].tolist())
            for side, t in ((source, numbers[known[row]]), (sink, known[row]))
        ]
        raise LayoutError(
            f"tensor {name} is {shapes[0]} on the source but {shapes[1]} on the sink; both sides "
            "must state the shape in the Hugging Face checkpoint",
            tensor=name,
            source_shape=shapes[0],
            sink_shape=shapes[1],
        )
    return numbers


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none") + more
