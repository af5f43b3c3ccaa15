"""Executes a plan: every tensor as chunks of rows, so that memory does not depend on the size of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import TensorPlan
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize import numerics as codes
from medusa_export.quantize.formats import FP8_MAX, INT8_MAX
from medusa_export.quantize.numerics import code_scale, fused_amax, quantize_fp8
from medusa_export.quantize.scales import Scales
from medusa_export.quantize.stored_parts import Kind

CHUNK_VALUES = (
    1 << 20
)  # 4 MB in float32: larger temporaries are mapped anew each time, which costs more than the arithmetic
SATURATION_SLACK = 1.01  # a weight may exceed its calibrated amax by rounding, not by belonging to another model


class TensorMaker:
    """The tensors of one layout, from a checkpoint and its scales.

    Raises (while rows are made):
        CheckpointError: values that the target dtype cannot hold, or weights that are not those that were calibrated.
    """

    def __init__(self, checkpoint: MedusaCheckpoint, spec: ExportSpec, scales: Scales) -> None:
        self.checkpoint, self.spec, self.scales = checkpoint, spec, scales

    def rows(self, plan: TensorPlan) -> Iterator[torch.Tensor]:
        """The tensor in chunks of rows, in the plan's dtype.  # [n, ...], n adding up to plan.shape[0]"""
        if plan.kind in NUMBERS:
            value = torch.as_tensor(NUMBERS[plan.kind](self, plan))
            yield value.to(getattr(torch, plan.dtype)).reshape(plan.shape)
            return
        make, packed = CHUNKS[plan.kind], 2 if plan.kind is Kind.INT4 else 1
        width = max(1, self._width(plan))
        step = max(2, CHUNK_VALUES // width // 2 * 2)  # even: two rows of INT4 share a byte
        rows = plan.shape[0] * packed
        for start in range(0, rows, step):
            yield make(self, plan, start, min(start + step, rows))

    def _width(self, plan: TensorPlan) -> int:
        """Values that a row is made from: all columns are read, also where a rank keeps some of them."""
        return math.prod(self.checkpoint.shape(plan.sources[0].tensor)[1:]) if plan.sources else 1

    def stacked(
        self, plan: TensorPlan, start: int, stop: int, columns: tuple[int, int] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of the stacked sources, zeros below them.  # [stop - start, ...]

        Args:
            plan: of the tensor.
            start: first row.
            stop: behind the last row.
            columns: (first, behind the last) to keep; None: all.
            dtype: of the result.
        """
        parts, first = [], 0
        for source in plan.sources:
            end = self.checkpoint.shape(source.tensor)[0] if source.stop is None else source.stop
            count = end - source.start
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                rows = self.checkpoint.read_rows(source.tensor, source.start + low, source.start + high)
                parts.append(rows if columns is None else rows[:, columns[0] : columns[1]])
            first += count
        missing = stop - start - sum(len(part) for part in parts)
        if missing:
            shape = parts[0].shape[1:] if parts else plan.shape[1:]
            parts.append(torch.zeros((missing, *shape), dtype=parts[0].dtype if parts else dtype))
        if len(parts) == 1:
            return parts[0].to(dtype)
        return torch.cat([part.to(dtype) for part in parts])

    def _weights(self, plan: TensorPlan, start: int, stop: int, *, whole_rows: bool = False) -> torch.Tensor:
        """float32 rows of the weight, smoothed where the format smooths, after checking that they are finite.

        Args:
            whole_rows: all columns, also on ranks that hold some of them: what a scale a row is taken from.
        """
        weight = self._smoothed(plan, start, stop, None if whole_rows else plan.columns)
        _largest(plan, weight)
        return weight

    def _smoothed(self, plan: TensorPlan, start: int, stop: int, columns: tuple[int, int] | None) -> torch.Tensor:
        weight = self.stacked(plan, start, stop, columns, torch.float32)
        if self.spec.weight_format.smooths:
            weight = weight * (1.0 / _part(self.scales.pre_quant_scale[plan.modules[0]], columns))
        return weight

    def _copy(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        rows = self.stacked(plan, start, stop, plan.columns, getattr(torch, plan.dtype))
        _largest(plan, rows)
        return rows

    def _fp8(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        scale = self._weight_scale(plan)
        weight = self._smoothed(plan, start, stop, plan.columns)
        if (largest := _largest(plan, weight)) > scale * FP8_MAX * SATURATION_SLACK:
            raise CheckpointError(
                plan.name,
                f"a weight of {largest:.4g}",
                f"at most the calibrated {scale * FP8_MAX:.4g}",
                "calibrate with this very checkpoint",
            )
        return quantize_fp8(weight, scale)

    def _row_scale(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        return codes.row_scales(self._weights(plan, start, stop, whole_rows=True), self.spec.weight_format.weight_bound)

    def _fp8_row(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        weight = self._weights(plan, start, stop, whole_rows=True)
        return quantize_fp8(_columns(weight, plan), codes.row_scales(weight, FP8_MAX)[:, None])

    def _int8_row(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        weight = self._weights(plan, start, stop, whole_rows=True)
        return codes.int8_rows(_columns(weight, plan), codes.row_scales(weight, INT8_MAX))

    def _int4(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        return codes.pack_rows(codes.int4_groups(self._weights(plan, start, stop), self._group_size))

    def _group_scale(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        return codes.group_scales(self._weights(plan, start, stop), self._group_size)

    def _fp4(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        return codes.fp4_blocks(self._weights(plan, start, stop), self._weight_scale(plan), self._group_size)

    def _block_scale(self, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
        return codes.fp4_block_scales(self._weights(plan, start, stop), self._weight_scale(plan), self._group_size)

    @property
    def _group_size(self) -> int:
        return self.spec.weight_format.group_size or 1

    def _smoothing(self, plan: TensorPlan) -> torch.Tensor:
        factors = _part(self.scales.pre_quant_scale[plan.modules[0]], plan.columns)
        stored = factors.to(getattr(torch, plan.dtype))
        if not bool((torch.isfinite(stored) & (stored > 0)).all()):
            raise CheckpointError(
                plan.name,
                f"factors of {float(factors.min()):.4g} .. {float(factors.max()):.4g}",
                f"finite numbers above 0 in {plan.dtype}",
                "use --dtype bfloat16, or another --quant",
            )
        return stored

    def _weight_scale(self, plan: TensorPlan) -> float:
        return code_scale(fused_amax(self.scales.weight_amax, plan.modules), self.spec.weight_format.tensor_bound)

    def _input_scale(self, plan: TensorPlan) -> float:
        return code_scale(fused_amax(self.scales.input_amax, plan.modules), self.spec.weight_format.input_bound or 1.0)

    def _kv_scale(self, plan: TensorPlan) -> float:
        cache = self.spec.kv_cache
        return max(cache.min_scale, code_scale(self.scales.kv_amax[plan.layer], cache.bound))


def _part(vector: torch.Tensor, columns: tuple[int, int] | None) -> torch.Tensor:
    return vector if columns is None else vector[columns[0] : columns[1]]


def _columns(weight: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    return weight if plan.columns is None else weight[:, plan.columns[0] : plan.columns[1]]


def _largest(plan: TensorPlan, rows: torch.Tensor) -> float:
    """Of the absolute values, all of which have to be finite."""
    low, high = (float(bound) for bound in rows.aminmax())  # one pass, and NaN comes through
    if not math.isfinite(low) or not math.isfinite(high):
        raise CheckpointError(
            plan.name,
            f"a value that {str(rows.dtype).removeprefix('torch.')} cannot hold",
            "finite weights",
            "use dtype bfloat16, or check the checkpoint for NaN",
        )
    return max(-low, high)


NUMBERS: dict[Kind, Callable[[TensorMaker, TensorPlan], float | torch.Tensor]] = {
    Kind.WEIGHT_SCALE: TensorMaker._weight_scale,
    Kind.INPUT_SCALE: TensorMaker._input_scale,
    Kind.KV_SCALE: TensorMaker._kv_scale,
    Kind.SMOOTHING: TensorMaker._smoothing,
}
CHUNKS: dict[Kind, Callable[[TensorMaker, TensorPlan, int, int], torch.Tensor]] = {
    Kind.COPY: TensorMaker._copy,
    Kind.FP8: TensorMaker._fp8,
    Kind.FP8_ROW: TensorMaker._fp8_row,
    Kind.INT8_ROW: TensorMaker._int8_row,
    Kind.INT4: TensorMaker._int4,
    Kind.FP4: TensorMaker._fp4,
    Kind.ROW_SCALE: TensorMaker._row_scale,
    Kind.GROUP_SCALE: TensorMaker._group_scale,
    Kind.BLOCK_SCALE: TensorMaker._block_scale,
}
