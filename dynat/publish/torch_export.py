"""``network.pt2``: the target in eval mode with its normalisation, for any batch, by ``torch.export``."""

from collections.abc import Iterator
from pathlib import Path

import torch

from dynat.data.splits import to_unit
from dynat.publish.agreement import compare
from dynat.publish.audited import Release

FILE = "network.pt2"


def write(release: Release, folder: Path) -> Iterator[str]:
    """Write the program and read it back for the comparison; :class:`UserError` where it differs."""
    example = to_unit(release.data.test_images[:2])
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(release.network, (example,), dynamic_shapes=shapes)
    torch.export.save(program, folder / FILE)
    yield from compare(release, torch.export.load(folder / FILE).module(), folder)
