"""Images by PIL, as stored: EXIF orientation is not applied, of deep grey the upper 8 bits count."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin

from hvd_lb.data.decoding.essential import essential
from hvd_lb.data.files.header import BrokenHeader, read_header
from hvd_lb.data.files.section import Section
from hvd_lb.data.images import Images
from hvd_lb.data.options import MAX_PIXELS, MOST_PIXELS
from hvd_lb.errors import HostError, UserError

# Of what is bounded here anyway, by `max_pixels`.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a loader has its own

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM")
"""PIL's names of what is decoded."""
# PIL turns TIFF images, and only those, by their orientation; this turns them back.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_FIRST_ON_ITS_SIDE = 5


class BadImage(UserError):
    """An image that is broken in itself, so that a run may do without it: `name` and, in a few words, `reason`.

    Never raised for what the file system, the memory or a change of the file is to blame for.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: cannot be decoded ({reason}); repair or remove it")
        self.name, self.reason = name, reason


def check_header(images: Images, image_id: int, content: np.ndarray, max_pixels: int = MAX_PIXELS) -> None:
    """BadImage for an image file's bytes without a size, or with more than `max_pixels` pixels, in the index.

    Of images with broken headers the index has width and height 0. UserError when this one has changed since.
    """
    indexed = size = int(images.widths[image_id]), int(images.heights[image_id])
    if not size[0]:
        try:
            header = read_header(Section.of_bytes(content.data))
        except BrokenHeader as error:
            raise BadImage(images.name(image_id), str(error)) from error
        size = header.width, header.height
    if size[0] * size[1] > max_pixels:
        raise _too_large(images, image_id, size, max_pixels)
    if size != indexed:
        raise _changed(images, image_id, size)


def refuse_large(images: Images, max_pixels: int) -> None:
    """BadImage, the one with most pixels, if that has more than `max_pixels`."""
    largest = getattr(images, "largest", None)  # which an index knows
    if largest is None:
        pixels = images.widths.astype(np.int64) * images.heights
        largest = int(pixels.argmax())
    size = int(images.widths[largest]), int(images.heights[largest])
    if size[0] * size[1] > max_pixels:
        raise _too_large(images, largest, size, max_pixels)


def decode_image(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    """An image file's bytes to uint8 (height, width, 3). BadImage when broken, UserError when not as indexed.

    This decides for both loaders whether an image is broken. Nothing is decoded before the header's size has been found
    to be that of the index.
    """
    name = images.name(image_id)
    try:
        with Image.open(io.BytesIO(essential(content.data)), formats=FORMATS) as image:
            size = _checked_size(name, image)
            if size != (images.widths[image_id], images.heights[image_id]):
                raise _changed(images, image_id, size)
            decoded = _as_stored(image)
    except UserError:
        raise
    except MemoryError as error:
        raise HostError(f"{name}: not enough memory to decode it; lower --max-pixels") from error
    except Exception as error:  # what PIL raises for broken files is not limited to a few types
        raise BadImage(name, _reason(error)) from error
    if decoded.shape[1::-1] != size:
        found = decoded.shape[1::-1]
        raise BadImage(
            name, f"holds {found[0]} x {found[1]} pixels, but its header says {size[0]} x {size[1]}"
        )
    return decoded


def _checked_size(name: str, image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if _tiff_orientation(image) >= _FIRST_ON_ITS_SIDE:
        width, height = height, width
    if width * height > MOST_PIXELS:
        raise BadImage(name, f"{width} x {height} pixels are more than the {MOST_PIXELS} that can be decoded")
    if min(width, height) < 1:
        raise BadImage(name, f"its header says {width} x {height} pixels")
    return width, height


def _too_large(images: Images, image_id: int, size: tuple[int, int], max_pixels: int) -> BadImage:
    pixels = f"{size[0]} x {size[1]} pixels"
    return BadImage(images.name(image_id), f"{pixels} are more than the {max_pixels} of --max-pixels")


def _changed(images: Images, image_id: int, size: tuple[int, int]) -> UserError:
    return UserError(
        f"{images.name(image_id)}: is {size[0]} x {size[1]} pixels now, but was "
        f"{images.widths[image_id]} x {images.heights[image_id]} when the data set was opened; "
        "leave files in use alone"
    )


def _as_stored(image: Image.Image) -> np.ndarray:
    turned = _tiff_orientation(image)
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        image = Image.fromarray(_upper_bits(image))  # PIL would cut off at 255
    image.info.pop("transparency", None)  # convert drops it too, but may warn
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image.transpose(_TURN_BACK[turned]) if turned in _TURN_BACK else image)


def _upper_bits(image: Image.Image) -> np.ndarray:
    """uint8 (height, width) of deep grey. In TIFF it may have 12 bits, and 0 may be white: PIL says nothing."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = 12 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 16
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return 255 - grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else grey


def _reason(error: Exception) -> str:
    """What PIL says, on one line and without the name of the file or the buffer."""
    lines = str(getattr(error, "strerror", None) or error).split("\n")
    text = lines[0].strip() or type(error).__name__
    return "no known image format" if text.startswith("cannot identify image file") else text


def _tiff_orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1
