"""Images by PIL, as stored: EXIF orientation is not applied, 16-bit grey is scaled to 8 bits, not cut off."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image

from hvd_lb.data.images import Images
from hvd_lb.errors import UserError

# A header may promise more pixels than any memory holds; this is where PIL, too, refuses to open a file.
MAX_PIXELS = 178_956_970

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


def read_size(path: str) -> tuple[int, int]:
    """Width and height, from the header alone. UserError for what is no image, or too large a one."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if _tiff_orientation(image) >= _FIRST_ON_ITS_SIDE:
                width, height = height, width
    except Exception as error:  # what PIL raises for broken files is not limited to a few types
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)})") from error
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path}: {width} x {height} pixels are more than the {MAX_PIXELS} that can be decoded"
        )
    return width, height


def decode_image(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    """An image file's bytes to uint8 (height, width, 3). UserError when it is broken or not as indexed."""
    try:
        with Image.open(io.BytesIO(content.tobytes())) as image:
            decoded = _as_stored(image)
    except Exception as error:
        raise UserError(
            f"{images.name(image_id)}: cannot be decoded ({_reason(error)}); mend or remove it"
        ) from error
    size, indexed = decoded.shape[1::-1], (images.widths[image_id], images.heights[image_id])
    if size != indexed:
        raise UserError(
            f"{images.name(image_id)}: is {size[0]} x {size[1]} pixels now, but was "
            f"{indexed[0]} x {indexed[1]} when the data set was opened; leave files in use alone"
        )
    return decoded


def _as_stored(image: Image.Image) -> np.ndarray:
    turned = _tiff_orientation(image)
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        grey = np.rint(np.asarray(image) / 257).astype(np.uint8)  # 65535 / 255; PIL would cut off at 255
        image = Image.fromarray(grey)
    image.info.pop("transparency", None)  # convert drops it too, but may warn
    image = image.convert("RGB")
    return np.asarray(image.transpose(_TURN_BACK[turned]) if turned in _TURN_BACK else image)


def _reason(error: Exception) -> str:
    """What PIL says, on one line and without the name of the file or the buffer."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return "no known image format" if text.startswith("cannot identify image file") else text.splitlines()[0]


def _tiff_orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1
