"""PNG files of 16 bits in several channels, of which pillow keeps 8."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the kind of colour


def read(data: bytes) -> np.ndarray:
    """Returns the picture in a PNG file of 16 bits as uint16 `(height, width, channels)`.

    A filter of PNG works on the bytes of a pixel one by one: the first bytes of all pixels are a
    picture of 8 bits under the same filters, and so are the second bytes. Pillow undoes the filters
    of each of these.

    Raises:
        ValueError: if the file is not whole, not of 16 bits or interlaced.
        zlib.error: if its data are damaged.

    Example:
        >>> lines = b"".join(b"\\0" + bytes([1, 2, 3, 4, 5, 6]) for _ in range(2))
        >>> header = struct.pack(">2I5B", 1, 2, 16, 2, 0, 0, 0)
        >>> read(_file(header, lines))[0, 0].tolist()
        [258, 772, 1286]
    """
    chunks = list(_chunks(data))
    header = next((body for name, body in chunks if name == b"IHDR"), b"")
    if len(header) != 13 or chunks[-1][0] != b"IEND":
        raise ValueError("the file is truncated")
    width, height, bits, kind, _, _, interlaced = struct.unpack(">2I5B", header)
    if bits != 16 or interlaced:
        raise ValueError(f"it has {bits} bits{' and is interlaced' * interlaced}: save it plainly")
    size = 2 * CHANNELS[kind]
    compressed = b"".join(body for name, body in chunks if name == b"IDAT")
    # No more than the picture has: a small file can claim to hold gigabytes.
    lines = zlib.decompressobj().decompress(compressed, height * (1 + width * size) + 1)
    rows = np.frombuffer(lines, np.uint8).reshape(height, 1 + width * size)
    filters, pixels = rows[:, :1], rows[:, 1:].reshape(height, width, size)
    planes = [_plane(np.concatenate([filters, pixels[..., n]], 1)) for n in range(size)]
    return np.stack(planes, axis=-1).view(">u2").astype(np.uint16)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the parts of a PNG file."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        yield name, data[start + 8 : start + 8 + length]
        start += 12 + length


def _plane(rows: np.ndarray) -> np.ndarray:
    """Undoes the filters of a picture of bytes, `(height, 1 + width)` with each row's filter."""
    height, width = rows.shape
    header = struct.pack(">2I5B", width - 1, height, 8, 0, 0, 0, 0)
    with PIL.Image.open(io.BytesIO(_file(header, rows.tobytes()))) as picture:
        return np.asarray(picture)


def _file(header: bytes, lines: bytes) -> bytes:
    """Returns the bytes of a PNG file."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
