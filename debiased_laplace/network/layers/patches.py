r"""What the kernel of a convolution sees, and sums of outer products of it.

Two entries of a patch are a displacement apart. Over *all* positions, those included at which the kernel hangs over
the edge, the sum of their products depends on nothing else,

.. math::
    \sum_s a_{cks}\, a_{c'ls} = R_{cc'}(l - k), \qquad R_{cc'}(\delta) = \sum_u x_{cu}\, x_{c',u+\delta},

so that of the 81 products of a kernel of 3 x 3, 15 are left. They are the weight gradient of a convolution of the
images with themselves, which every backend has; of a large kernel that is for every channel alone, they are the
Fourier transform of the power of the images. The positions that the layer does not have, a line or two at every edge,
are subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: By how much there have to be fewer products of numbers: their rate is lower than that of products of matrices.
GAIN = 2.0

#: Products of numbers in the time that it takes to put an entry of the matrix together, once for all images.
ASSEMBLED = 400

#: Products of a channel at a position in whose place there are Fourier transforms.
TRANSFORMED = 20

#: Positions at a time of which a backend sums products: one after the other, with errors that grow with their number.
TOGETHER = 2**12

#: Zeros before and after in every dimension; what is negative is cut off.
Padding = Sequence[tuple[int, int]]


def padded(images: Tensor, padding: Padding) -> Tensor:
    """Images with zeros around them, contiguous."""
    pad = [amount for pair in reversed(padding) for amount in pair]
    return F.pad(images, pad).contiguous() if any(pad) else images.contiguous()


@dataclass(frozen=True)
class Patches:
    """Where a kernel is applied to images.

    Attributes:
        kernel: Its shape.
        positions: How many there are in every dimension.
        stride: Between them.
        dilation: Between the entries of the kernel.
        padding: Of the images.
        groups: G, of their channels.
    """

    kernel: tuple[int, ...]
    positions: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int

    def columns(self, images: Tensor, *, ones: bool) -> Tensor:
        """What the kernel sees at every position, ``[N, G, C * kernel (+ 1), S]``.

        Args:
            images: ``[N, G * C, ...]``.
            ones: Whether a one comes last, for a bias.
        """
        images = padded(images, self.padding)
        n, per_group = len(images), images.shape[1] // self.groups
        if set(self.kernel + self.stride) == {1} and not ones:  # the images themselves
            return images.reshape(n, self.groups, per_group, -1)
        # Kernel positions and output positions are both strides into the input: patches without arithmetic.
        by_sample, by_channel, *steps = images.stride()
        windows = images.as_strided(
            (n, self.groups, per_group, *self.kernel, *self.positions),
            (
                by_sample, by_channel * per_group, by_channel,
                *(by * every for by, every in zip(steps, self.dilation, strict=True)),
                *(by * every for by, every in zip(steps, self.stride, strict=True)),
            ),
        )  # fmt: skip
        size = per_group * math.prod(self.kernel)
        # Data next to positions in memory: sums over both are then products of matrices without another copy.
        columns = images.new_empty(self.groups, size + ones, n, math.prod(self.positions)).permute(2, 0, 1, 3)
        columns[:, :, :size].unflatten(-1, self.positions).unflatten(2, (per_group, *self.kernel)).copy_(windows)
        columns[:, :, size:] = 1
        return columns

    def sums(self, images: Tensor, *, ones: bool) -> Tensor:
        """Sums of :meth:`columns` over positions, ``[N, G, C * kernel (+ 1), 1]``, one dimension after the other.

        What an entry of the kernel sees at all positions is a line of pixels in every dimension: the sums are products
        with matrices that tell how often, and no patch is formed.
        """
        sums = images
        for dimension in reversed(range(len(self.kernel))):
            pixels, k = images.shape[2 + dimension], self.kernel[dimension]
            entries, positions = (torch.arange(size, device=images.device) for size in (k, self.positions[dimension]))
            seen = positions * self.stride[dimension] - self.padding[dimension][0]
            seen = seen + entries[:, None] * self.dilation[dimension]  # [K, positions]
            # What is beyond the edges is counted in a line of its own on either side, without waiting for a card.
            line, entry = (seen + 1).clamp_(0, pixels + 1), entries[:, None].expand_as(seen)
            counts = sums.new_zeros(pixels + 2, k).index_put_((line, entry), sums.new_ones(()), accumulate=True)[1:-1]
            # The last dimension is that of pixels still, since those of the kernel go to the front.
            sums = (sums @ counts).movedim(-1, 2)
        sums = sums.reshape(len(images), self.groups, -1, 1)
        return F.pad(sums, (0, 0, 0, 1), value=float(math.prod(self.positions))) if ones else sums

    def sums_displacements(self, images: Sequence[int]) -> bool:
        """Whether :meth:`second_moment` of images of this shape is fast: many fewer products than positions have."""
        n_images, channels, *size = images
        if set(self.stride) != {1} or math.prod(self.kernel) == 1 or not n_images:
            return False
        apart = min(self._n_displacements, TRANSFORMED) if channels == self.groups else self._n_displacements
        needed = apart * math.prod(size)
        needed += sum(math.prod(edge.kernel) ** 2 * math.prod(edge.positions) for edge, *_ in self._edges(size))
        return GAIN * needed < math.prod(self.kernel) ** 2 * (math.prod(self.positions) - ASSEMBLED / n_images)

    @property
    def _reach(self) -> list[int]:
        """Of the kernel in every dimension: pixels between its first and its last entry."""
        return [step * (k - 1) for step, k in zip(self.dilation, self.kernel, strict=True)]

    @property
    def _n_displacements(self) -> int:
        """How many there are up to their sign, with some twice."""
        return self.kernel[0] * math.prod(2 * k - 1 for k in self.kernel[1:])

    def second_moment(self, images: Tensor, roots: Tensor | None) -> Tensor:
        r"""Sum of the outer products of :meth:`columns` over images and positions, with stride one.

        Args:
            images: ``[N, G * C, ...]``; times the root of a weight each, if they have some.
            roots: What the ones are times in every image, ``[N]``, if there are ones; None if not.

        Returns:
            ``[G, C * kernel (+ 1), C * kernel (+ 1)]``.
        """
        size, channels = images.shape[2:], images.shape[1] // self.groups
        total = self._at_all_positions(images)
        for edge, dimension, lines, first in self._edges(size):
            outside = edge.columns(images[(slice(None),) * (2 + dimension) + (lines,)], ones=False)
            flat = outside.permute(1, 2, 0, 3).flatten(2)
            there = total
            for axis in (2 + dimension, 3 + len(size) + dimension):
                there = there.narrow(axis, first, edge.kernel[dimension])
            there -= (flat @ flat.mT).view(there.shape)
        inputs = channels * math.prod(self.kernel)
        square = total.reshape(self.groups, inputs, inputs)
        if roots is None:
            return square
        ones = self.columns(torch.einsum("n...,n->...", images, roots)[None], ones=False)[0].sum(-1)
        with_ones = F.pad(square, (0, 1, 0, 1))
        with_ones[:, :inputs, inputs] = with_ones[:, inputs, :inputs] = ones
        with_ones[:, inputs, inputs] = roots.square().sum() * math.prod(self.positions)
        return with_ones

    def _edges(self, size: Sequence[int]) -> Iterator[tuple[Patches, int, slice, int]]:
        """The positions outside of those of the layer.

        Yields:
            Their patches, of which lines of the images in a dimension, the dimension, these lines, and the entry of the
            kernel that is at the first of them.
        """
        reach = self._reach
        for dimension, (k, step, (before, _)) in enumerate(zip(self.kernel, self.dilation, self.padding, strict=True)):
            later = range(dimension + 1, len(size))
            for position in range(-reach[dimension], size[dimension]):  # of the first entry, in the images
                entries = [entry for entry in range(k) if 0 <= position + step * entry < size[dimension]]
                if entries and not 0 <= position + before < self.positions[dimension]:
                    edge = Patches(
                        (*self.kernel[:dimension], len(entries), *self.kernel[dimension + 1 :]),
                        (*self.positions[:dimension], 1, *(size[other] + reach[other] for other in later)),
                        self.stride,
                        (*self.dilation[:dimension], 1, *self.dilation[dimension + 1 :]),
                        (*self.padding[:dimension], (0, 0), *((reach[other],) * 2 for other in later)),
                        self.groups,
                    )
                    lines = slice(position + step * entries[0], position + step * entries[-1] + 1, step)
                    yield edge, dimension, lines, entries[0]

    def _at_all_positions(self, images: Tensor) -> Tensor:
        """The sum over all positions, ``[G, C, *kernel, C, *kernel]``."""
        depthwise = images.shape[1] == self.groups
        total = self._powers(images) if depthwise and self._n_displacements > TRANSFORMED else self._products(images)
        dimensions = len(self.kernel)
        for dimension, k in enumerate(self.kernel):
            entries = torch.arange(k, device=images.device)
            apart = k - 1 + entries[None, :] - entries[:, None]  # [of the first, of the second]
            axis = 3 + 2 * dimension
            total = total.index_select(axis, apart.flatten()).unflatten(axis, (k, k))
        first, second = range(3, 3 + 2 * dimensions, 2), range(4, 4 + 2 * dimensions, 2)
        return total.permute(0, 1, *first, 2, *second).contiguous()

    def _products(self, images: Tensor) -> Tensor:
        """R at all displacements, ``[G, C, C, 2 K - 1, ...]``, as the weight gradient of a convolution."""
        reach = self._reach
        channels, dimensions = images.shape[1], len(self.kernel)
        shape = (channels, channels // self.groups, self.kernel[0], *(2 * k - 1 for k in self.kernel[1:]))
        sums = images.new_zeros(shape)
        for piece in images.split(max(1, TOGETHER // math.prod(images.shape[2:]))):
            shifted = padded(piece, [(0, reach[0]), *((r, r) for r in reach[1:])])
            _, of_piece, _ = torch.ops.aten.convolution_backward(
                piece, shifted, sums, None, [1] * dimensions, [0] * dimensions, list(self.dilation), False,
                [0] * dimensions, self.groups, [False, True, False],
            )  # fmt: skip
            sums += of_piece
        half = sums.unflatten(0, (self.groups, -1))  # [G, C, C, K, 2 K - 1, ...]: none is negative in the first
        other = half[:, :, :, 1:].flip([*range(3, 3 + dimensions)]).transpose(1, 2)
        return torch.cat([other, half], 3)

    def _powers(self, images: Tensor) -> Tensor:
        """The same of one channel in every group, as the Fourier transform of squared Fourier transforms."""
        size = [-(-(pixels + reach) // 4) * 4 for pixels, reach in zip(images.shape[2:], self._reach, strict=True)]
        powers = [
            torch.view_as_real(torch.fft.rfftn(piece, size, dim=tuple(range(2, images.ndim)))).square().sum((0, -1))
            for piece in images.split(8)
        ]
        power = torch.stack(powers).sum(0)
        sums = torch.fft.irfftn(
            torch.complex(power, torch.zeros_like(power)), size, dim=tuple(range(1, images.ndim - 1))
        )
        for axis, (k, step, length) in enumerate(zip(self.kernel, self.dilation, size, strict=True), start=1):
            sums = sums.index_select(axis, torch.arange(1 - k, k, device=images.device) * step % length)
        return sums[:, None, None]


def second_moment(
    patches: Patches, images: Tensor, dtype: torch.dtype, ones: bool, weights: Tensor | None
) -> Tensor | None:
    """:meth:`Patches.second_moment` in a precision, with a weight for every image; None if it is not fast.

    Nor is it on a card, where few large products are faster than many small ones.
    """
    if not len(images) or images.device.type != "cpu" or not patches.sums_displacements(images.shape):
        return None
    roots = images.new_ones(len(images), dtype=dtype) if weights is None else weights.to(images.device, dtype).sqrt()
    images = images.to(dtype)
    if weights is not None:
        images = images * roots.view(-1, *[1] * (images.ndim - 1))
    return patches.second_moment(images, roots if ones else None)
