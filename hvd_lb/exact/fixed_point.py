"""Sums of tensors that do not depend on the order of their terms (docs/exactness.md).

Adding floating-point numbers is not associative, adding integers is. A term x of tensor i becomes the integers
round(x · 2^e_i); these are added up, over microbatches and over processes, and their sum becomes floating point once.
The exponent e_i follows from the largest |x| among *all* terms of the sum before, which every process knows, and never
from what one process has seen. So the result has the same bits however the terms are divided among processes.

The integers of a term take at most 62 − log2(terms) bits, so no sum can overflow. Exponents leave room for terms that
are 2^GROWTH_BITS times larger than those of the sum before. Larger ones are found before they are used: the sum is
given up on all processes alike, the exponents are corrected, and the step is taken again.

The integers of a single term are numbers of its own floating-point type, too. One addition of two such gives their sum,
rounded once, as an int64 is when it becomes floating point. So sums of up to two terms are formed and exchanged in
floating point: half the bytes for the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_lb.world import Handle, World
from hvd_lb.world.arriving import Arriving
from hvd_lb.world.shared.adding import add

GROWTH_BITS = 10
# Before the first sum nothing is known: terms up to 2^14 are expected, more than gradients of a summed loss have.
_FIRST_BITS = 14
# Sums of so many terms need no int64.
_FEW_TERMS = 2
# What an int64 holds without its sign, less one bit so that rounding cannot reach the end.
_SUM_BITS = 62
# Powers of two up to here are normal numbers in fp32, as are their inverses.
_LARGEST_EXPONENT = 120
# Elements converted at once. On a CPU their integers, the sums and the scratch space stay in a core's cache; elsewhere
# it bounds the scratch space, 12 bytes an element.
_CHUNK_ON_CPU, _CHUNK = 1 << 17, 1 << 21
# Every tensor's place starts on a multiple of 64 bytes, in fp32 and wider.
ALIGNMENT = 16


class FixedPointOverflow(ArithmeticError):
    """Terms grew too much from one step to the next, on all processes alike; the step has to be taken again."""


@dataclass(frozen=True)
class _Block:
    """Neighbouring tensors, or a piece of a large one, that are converted at once."""

    span: slice  #: of the places of all tensors
    tensors: slice
    pieces: list[tuple[int, slice]]  #: the number of each tensor, and which of its elements
    maxima: Tensor  #: of the tensors
    total: Tensor  #: the sums in this span
    sums: list[Tensor]  #: those of each piece
    scratch: Tensor  #: as large as `total`
    scaled: list[Tensor]  #: for each piece, in there


class FixedPointSum:
    """Sums of up to `terms` terms for each of several tensors, of the dtype, shapes and strides of `like`.

    A sum is gathered by `add`, exchanged by `start`, and ends with `finish`, which makes room for the
    next one; between these `arrive` may be called, so that of several sums the host waits for the device once.
    `start` and `finish` are collective. Raises `RuntimeError` when more than `terms` terms were added.
    `riders` are as many integers that are added along: each process sets its own before `start`.

    Sums of few terms are formed in `room`, if given: of the dtype, with places for all of `like` at their `offsets_of`,
    then for a number of each, then for the riders.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        terms: int,
        name: str,
        world: World,
        riders: int = 0,
        room: Tensor | None = None,
    ) -> None:
        if terms < 1:
            raise ValueError(f"{name}: a sum of {terms} terms; expected at least 1")
        self._name, self._terms = name, terms
        self._term_bits = _SUM_BITS - (terms - 1).bit_length()
        self.exponents = [min(self._term_bits - _FIRST_BITS, _LARGEST_EXPONENT)] * len(like)
        first = like[0]
        self._dtype = first.dtype
        offsets = offsets_of(like)
        # The sums of all tensors, followed by the number of terms of each, are exchanged as one tensor.
        end = offsets[-1] + len(like)
        exact = first.dtype if formed_in_place(terms) else torch.int64
        if room is None or room.dtype != exact:
            room = world.room(f"{name}.exact", end + riders, exact, first.device)
        self._total = room
        self._counts, self.riders = self._total[offsets[-1] : end], self._total[end:]
        self._parts = [
            self._total[start : start + tensor.numel()] for start, tensor in zip(offsets, like, strict=False)
        ]
        self._strides = [tensor.stride() for tensor in like]
        self._added = [0] * len(like)
        self._maxima = torch.zeros(len(like), dtype=first.dtype, device=first.device)
        self._largest = list(self._maxima)
        self._chunk = max(1, min(offsets[-1], _CHUNK_ON_CPU if first.device.type == "cpu" else _CHUNK))
        self._float = torch.zeros(self._chunk, dtype=first.dtype, device=first.device)
        self._integer = None if exact == first.dtype else torch.empty_like(self._float, dtype=exact)
        self._blocks = self._in_blocks(offsets)
        self._handles: tuple[Handle, Handle] | None = None
        self._told: Arriving[float] | None = None  # numbers of terms, and maxima

    def _in_blocks(self, offsets: list[int]) -> list[_Block]:
        """Blocks of at most a chunk, in which no tensor occurs twice; none where some tensor is empty."""
        if not all(part.numel() for part in self._parts):
            return []
        blocks, begin, pieces = list[_Block](), 0, list[tuple[int, slice]]()

        def close(end: int) -> None:
            nonlocal begin
            if pieces:
                inside = [(offsets[index] + of.start - begin, of.stop - of.start) for index, of in pieces]
                span, tensors = slice(begin, end), slice(pieces[0][0], pieces[-1][0] + 1)
                total, scratch = self._total[span], self._float[: end - begin]
                sums, scaled = ([of[at : at + count] for at, count in inside] for of in (total, scratch))
                maxima = self._maxima[tensors]
                blocks.append(_Block(span, tensors, list(pieces), maxima, total, sums, scratch, scaled))
            pieces.clear()
            begin = end

        for index, part in enumerate(self._parts):
            done = 0
            while done < part.numel():
                at = offsets[index] + done
                if at - begin >= self._chunk:
                    close(at)
                stop = min(part.numel(), done + self._chunk - (at - begin))
                pieces.append((index, slice(done, stop)))
                if stop < part.numel():
                    close(offsets[index] + stop)
                done = stop
        close(offsets[-1])
        return blocks

    @property
    def empty(self) -> bool:
        """Whether no term has been added here since the last sum."""
        return not any(self._added)

    @property
    def exchanged_bytes(self) -> int:
        """The integers, and the maxima beside them."""
        return self._total.nbytes + self._maxima.nbytes

    @torch.no_grad()
    def add(self, index: int, term: Tensor) -> None:
        """Adds a term to tensor `index`."""
        flat, total = self._in_memory_order(index, term), self._parts[index]
        scale, first = 2.0 ** self.exponents[index], not self._added[index]
        for start in range(0, flat.numel(), self._chunk):
            part, sums = (tensor[start : start + self._chunk] for tensor in (flat, total))
            self._note(index, part)
            self._gather(sums, torch.mul(part, scale, out=self._float[: part.numel()]), first)
        self._added[index] += 1

    @torch.no_grad()
    def add_to_each(self, terms: Sequence[Tensor]) -> None:
        """Adds a term to every tensor: what `add` does to one after the other, with a few kernels for many."""
        if not self._blocks or len(set(self._added)) > 1:
            for index, term in enumerate(terms):
                self.add(index, term)
            return
        flat = [self._in_memory_order(index, term) for index, term in enumerate(terms)]
        scales = [2.0**exponent for exponent in self.exponents]
        first = not self._added[0]
        for block in self._blocks:
            parts = [flat[index][of] for index, of in block.pieces]
            if len(parts) == 1:
                index = block.tensors.start
                self._note(index, parts[0])
                torch.mul(parts[0], scales[index], out=block.scaled[0])
            else:
                # NaN when any element is
                largest = torch.stack(torch._foreach_max(torch._foreach_abs(parts)))
                torch.maximum(block.maxima, largest, out=block.maxima)
                torch._foreach_copy_(block.scaled, parts)
                torch._foreach_mul_(block.scaled, scales[block.tensors])
            self._gather(block.total, block.scratch, first)
        self._added = [added + 1 for added in self._added]

    def _gather(self, total: Tensor, scaled: Tensor, first: bool) -> None:
        """Adds scaled terms to a chunk of the sums; what is there of the sum before is overwritten by the first."""
        scaled.round_()
        if self._integer is None:
            torch.add(scaled, 0.0 if first else total, out=total)  # -0, which is no integer, + 0 is 0
        elif first:
            total.copy_(scaled)
        else:
            add(total, self._integer[: total.numel()].copy_(scaled), total)

    @torch.no_grad()
    def start(self, world: World) -> None:
        """Starts the exchange of what has been added here."""
        for part, added in zip(self._parts, self._added, strict=True):
            if not added:
                part.zero_()
        self._counts.copy_(torch.tensor(self._added), non_blocking=True)
        # NaN has no order, so a maximum over processes would depend on theirs.
        self._maxima.nan_to_num_(nan=math.inf, posinf=math.inf)
        self._told = None
        self._handles = (
            world.maximum_async(self._maxima, f"{self._name}.largest"),
            world.allreduce_async(self._total, self._name),
        )

    @torch.no_grad()
    def arrive(self) -> None:
        """Waits for the exchange; what the host has to know of the sums is on its way then."""
        if self._told is not None:
            return
        if self._handles is None:
            raise RuntimeError(f"{self._name}: the sum was not started")
        for handle in self._handles:
            handle.wait()
        self._handles = None
        # In one copy from the device; counts are exact in any floating-point number of 64 bits.
        self._told = Arriving(torch.cat([self._counts.double(), self._maxima.double()]), float)

    @torch.no_grad()
    def finish(self, out: Sequence[Tensor], flat: Tensor | None = None) -> tuple[list[int], list[int]]:
        """Waits and writes the sums into `out`: NaN where any term was not finite.

        `flat` is one tensor, in which those of `out` lie at `offsets_of` them, if there is one.
        Returns the number of terms of each tensor, and the tensors whose terms were too large for their exponent:
        of those `out` holds nothing, and the sum has to be gathered again, with the exponents that are now right.
        """
        self.arrive()
        assert self._told
        numbers = self._told.wait()
        counts, largest = list(map(int, numbers[: len(out)])), numbers[len(out) :]
        if max(counts) > self._terms:
            raise RuntimeError(f"{self._name}: a sum of {max(counts)} terms, announced were {self._terms}")
        limits = [2.0 ** (self._term_bits - exponent) for exponent in self.exponents]
        overflowed = [
            index
            for index, (most, limit) in enumerate(zip(largest, limits, strict=True))
            if limit < most < math.inf
        ]
        if flat is not None and self._blocks:
            self._write_all(flat)
        else:
            for index, tensor in enumerate(out):
                self._write(index, tensor)
        for tensor, most in zip(out, largest, strict=True):
            if not math.isfinite(most):
                tensor.fill_(math.nan)
        self._adapt(largest)
        self.discard()
        return counts, overflowed

    def _write_all(self, flat: Tensor) -> None:
        """The sums of all tensors in floating point, each at its place."""
        scales = [2.0**-exponent for exponent in self.exponents]
        for block in self._blocks:
            parts = block.sums
            if flat.data_ptr() != self._total.data_ptr():
                into = flat[block.span].copy_(block.total)
                starts = [piece.storage_offset() for piece in block.scaled]
                parts = [into[at : at + piece.numel()] for at, piece in zip(starts, parts, strict=True)]
            torch._foreach_mul_(parts, scales[block.tensors])

    def _write(self, index: int, tensor: Tensor) -> None:
        """The sum of tensor `index` in floating point."""
        out, total = self._in_memory_order(index, tensor), self._parts[index]
        for start in range(0, out.numel(), self._chunk):
            part = out[start : start + self._chunk]
            part.copy_(total[start : start + self._chunk]).mul_(2.0 ** -self.exponents[index])
        if out.data_ptr() != tensor.data_ptr():
            tensor.copy_(out.as_strided(tensor.shape, self._strides[index]))

    def discard(self) -> None:
        """Forgets the terms that were added."""
        self._handles = self._told = None
        self._maxima.zero_()
        self._added = [0] * len(self._added)

    def _adapt(self, largest: list[float]) -> None:
        """Exponents for the next sum; a tensor without a finite term, or with zeros only, keeps its own."""
        for index, most in enumerate(largest):
            if 0 < most < math.inf:
                exponent = self._term_bits - GROWTH_BITS - math.frexp(most)[1]
                self.exponents[index] = min(exponent, _LARGEST_EXPONENT)

    def _note(self, index: int, part: Tensor) -> None:
        low, high = torch.aminmax(part)  # both are NaN when any element is
        largest = self._largest[index]
        torch.maximum(largest, torch.maximum(high, low.neg_()), out=largest)

    def _in_memory_order(self, index: int, term: Tensor) -> Tensor:
        """The elements of a term in the order of its place, one-dimensional; a copy only where it lies otherwise."""
        strides, count = self._strides[index], self._parts[index].numel()
        if term.dtype != self._dtype or term.stride() != strides:
            laid_out = torch.empty_strided(term.shape, strides, dtype=self._dtype, device=term.device)
            term = laid_out.copy_(term)
        return term.as_strided((count,), (1,))


def formed_in_place(terms: int) -> bool:
    """Whether sums of so many terms are formed in the terms' own dtype, in the room that is given."""
    return terms <= _FEW_TERMS


def offsets_of(tensors: Sequence[Tensor]) -> list[int]:
    """Where tensors that lie one after the other begin, each aligned, and where the last one ends."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.numel() // ALIGNMENT) * ALIGNMENT)
    return offsets
