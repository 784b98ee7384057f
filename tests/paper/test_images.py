"""Images are the pixels of data and witness."""

import base64

import numpy as np

from dynat.paper.images import data_uri


def test_bitmap_holds_the_pixels_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(
        0, 256, (3, 5, 4), dtype=np.uint8
    )  # rows of 12 bytes: no padding
    data = base64.b64decode(data_uri(pixels).partition(",")[2])
    offset = int.from_bytes(data[10:14], "little")
    rows = np.frombuffer(data[offset:], np.uint8).reshape(5, 4, 3)[::-1, :, ::-1]  # bottom row first, BGR
    assert (rows.transpose(2, 0, 1) == pixels).all()
