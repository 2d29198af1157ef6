"""What curvature every trainable parameter got, as a table for people."""

from __future__ import annotations

from debiased_laplace.fitting.fitted import Fit


def coverage(fitted: Fit, subset: str = "all") -> str:
    """A line for each part of the basis: blocks, parameters, kind of curvature, numbers of parameters and directions.

    Args:
        fitted: The fit.
        subset: What was asked for: ``"all"`` trainable parameters, the ``"last_layer"``, or a ``"subnetwork"``.
    """
    network, basis = fitted.network, fitted.posterior.basis
    without_curvature = not bool(fitted.posterior.curvatures.any())
    rows, total = [("block", "parameters", "curvature", "size", "")], 0
    of_kinds: dict[str, int] = {}
    for part, members in zip(basis.parts, basis.members, strict=True):
        blocks = [network.blocks[index] for index in members]
        kind, shape = part.describe(blocks)
        kind = "prior alone" if without_curvature else kind
        names = ", ".join(name for block in blocks for name in block.parameters)
        masks = [network.free_entries(block) for block in blocks]
        size = sum(
            block.size if mask is None else int(mask.sum()) for block, mask in zip(blocks, masks, strict=True)
        )  # fmt: skip
        total += size
        of_kinds[kind] = of_kinds.get(kind, 0) + size
        rows.append((", ".join(block.name for block in blocks), names, kind, str(size), shape))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]  # fmt: skip
    shares = ", ".join(f"{100 * size / total:.3g} % {kind}" for kind, size in of_kinds.items())
    if len(of_kinds) > 1:
        lines.append(f"Share of the parameters: {shares}.")
    lines.append(f"{total} of {total} trainable parameters covered by {len(basis.parts)} blocks.")
    if subset == "last_layer":
        lines.append(f"The last layer: {', '.join(network.shapes)}.")
    left_out = [name for name in network.snapshot.parameters if name not in network.shapes]
    if left_out:
        what = "Frozen and left out" if subset == "all" else "Left out"
        lines.append(f"{what}: {', '.join(left_out)}.")
    return "\n".join(lines)
