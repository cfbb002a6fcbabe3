"""Images of every mode in 8-bit RGB, and files that cannot be decoded named."""

import os

import numpy as np
import PIL.Image


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Bring an image of any mode to 8-bit RGB.

    `PIL.Image.convert` clips 16-bit and float pixels to 255, which makes such images white; here the mode's range is
    scaled: 0 to 65535 of 16-bit images (`I;16`, and `I`, in which some of them are opened), 0 to 1 of float images
    (`F`). The range is the mode's, not the image's, so that images stay comparable; what an
    image of 12 bits in a 16-bit file uses of it cannot be told (PIL does not read PNG's `sBIT`), and it comes out
    dark. Transparent pixels are
    composited on white, as most viewers show them; dropping the alpha channel would turn transparent icons black.
    Transformers' pipelines clip and drop: give them images that were brought to RGB here.

    Args:
        image (`PIL.Image.Image`):
            An image of any mode and size.

    Returns:
        `PIL.Image.Image`: of mode `RGB` and the same size.

    Raises:
        `ValueError`: pixels of mode `I` outside 0 to 65535, or of mode `F` outside 0 to 1.

    Example:

    ```python
    >>> import numpy as np, PIL.Image
    >>> from iekd_hf.data.rgb import to_rgb
    >>> to_rgb(PIL.Image.fromarray(np.full((4, 4), 30000, np.uint16))).getpixel((0, 0))
    (117, 117, 117)
    >>> to_rgb(PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)

    ```
    """
    if image.mode == "F" or image.mode.startswith("I"):
        pixels, largest = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (pixels.min() >= 0 and pixels.max() <= largest):  # NaN is refused, too
            raise ValueError(
                f"Expected pixels from 0 to {largest} in an image of mode {image.mode}, got {pixels.min():g} to "
                f"{pixels.max():g}: scale them to that range, or save the images with 8 bits."
            )
        image = PIL.Image.fromarray((pixels * (255 / largest)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def explain_undecodable(image: dict | None, place: str, error: Exception) -> str:
    """Name an image, as `datasets` keeps it undecoded, that cannot be decoded, and say what to do."""
    path = (image or {}).get("path")
    named = f" ({os.path.basename(path)})" if path else ""
    if isinstance(error, ValueError) and str(error).startswith("Expected pixels"):
        return f"{error} It is the image in {place}{named}."
    return (
        f"Expected an image in {place}{named}, got something that cannot be read as one ({type(error).__name__}: "
        f"{error}): replace or remove it."
    )
