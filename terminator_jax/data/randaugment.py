"""RandAugment of whole batches of uint8 pictures, by pillow's own operations."""

import dataclasses
from collections.abc import Callable

import grain
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from terminator_jax.data.augment import SINGLE_PROCESS, Process
from terminator_jax.data.examples import Batch


def _moved(
    picture: Image.Image, *, shear_x: float = 0, shear_y: float = 0, x: float = 0, y: float = 0
) -> Image.Image:
    """Shears a picture about its centre and moves it by parts of its size; the rest is black."""
    width, height = picture.size
    matrix = (
        *(1, shear_x, x * width - shear_x * height / 2),
        *(shear_y, 1, y * height - shear_y * width / 2),
    )
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


# Each changes a picture by a level from -1 to 1; where a sign makes no sense, it does not count.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, level: picture,
    "autocontrast": lambda picture, level: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level: ImageOps.equalize(picture),
    "rotate": lambda picture, level: picture.rotate(30 * level, Image.Resampling.BILINEAR),
    "solarize": lambda picture, level: ImageOps.solarize(picture, round(256 * (1 - abs(level)))),
    "posterize": lambda picture, level: ImageOps.posterize(picture, 8 - round(4 * abs(level))),
    "color": lambda picture, level: ImageEnhance.Color(picture).enhance(1 + 0.9 * level),
    "contrast": lambda picture, level: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * level),
    "brightness": lambda picture, level: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * level),
    "sharpness": lambda picture, level: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * level),
    "shear_x": lambda picture, level: _moved(picture, shear_x=0.3 * level),
    "shear_y": lambda picture, level: _moved(picture, shear_y=0.3 * level),
    "translate_x": lambda picture, level: _moved(picture, x=0.45 * level),
    "translate_y": lambda picture, level: _moved(picture, y=0.45 * level),
}


@dataclasses.dataclass(frozen=True)
class RandAugment(grain.transforms.RandomMap):
    """Changes each picture by random ones of `OPERATIONS`, one after the other.

    Args:
        operations: how many; the same one may be drawn twice.
        strength: the level of each, in [0, 1]; its sign is random.
        process: the part of the global batch that the transformation sees.

    Example:
        >>> batch = {"image": np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)}
        >>> changed = RandAugment(2, 0.5).random_map(batch, np.random.default_rng(1))["image"]
        >>> changed.shape, changed.dtype
        ((1, 2, 2, 3), dtype('uint8'))

    References:
        Cubuk et al, `RandAugment: Practical automated data augmentation with a reduced search space
        <https://arxiv.org/abs/1909.13719>`_, 2020. The largest changes are those of AutoAugment.
    """

    operations: int
    strength: float
    process: Process = SINGLE_PROCESS

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """Changes the pictures of a batch; labels stay as they are.

        Raises:
            ValueError: unless the pictures are of uint8 and have 1 or 3 channels.
        """
        images = element["image"]
        if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"expected uint8 of 1 or 3 channels, got {images.dtype} of {images.shape[-1]}"
            )
        functions = list(OPERATIONS.values())
        shape = (len(images), self.operations)
        chosen = self.process.draw_local(lambda n: rng.integers(len(functions), size=n), shape)
        levels = self.strength * self.process.draw_local(lambda n: rng.choice((-1, 1), n), shape)
        changed = np.empty_like(images)
        for n, image in enumerate(images):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            for operation, level in zip(chosen[n], levels[n], strict=True):
                picture = functions[operation](picture, float(level))
            changed[n] = np.asarray(picture).reshape(image.shape)
        return {**element, "image": changed}
