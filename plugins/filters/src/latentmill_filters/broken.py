"""Blank pictures: black, of one colour, or nearly so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentmill.plugin import RowError, tensors
from latentmill_filters.scorer import Scorer, no_pictures, written

LEVELS = np.arange(256)


class Broken(Scorer):
    """Scores brightness and contrast, and filters what is blank. What was not finite before it became bytes is such a picture.

    ``brightness`` is the mean of all values of all channels, from 0 for black to 1 for white. ``contrast`` is the standard deviation
    of a channel's values, of the channel in which it is largest: from 0 for a picture of one colour to 0.5. Both are of values that
    are divided by 255. A bound of None lets all pass.
    """

    contract = 2
    adds = (pa.field("brightness", pa.float64(), nullable=False), pa.field("contrast", pa.float64(), nullable=False))

    def __init__(
        self,
        min_contrast: float | None = 0.01,
        min_brightness: float | None = None,
        max_brightness: float | None = None,
    ) -> None:
        self.min_contrast, self.min_brightness, self.max_brightness = min_contrast, min_brightness, max_brightness

    def scores(self, batch: pa.Table) -> Iterable[Mapping[str, float] | RowError]:
        if without := no_pictures(batch):
            return without
        return [brightness_and_contrast(picture) for picture in tensors.from_arrow(batch, "image").numpy()]

    def reason(self, scores: Mapping[str, float]) -> str:
        brightness, contrast = scores["brightness"], scores["contrast"]
        if self.min_contrast is not None and contrast < self.min_contrast:
            if contrast == 0:
                return "a black picture" if brightness == 0 else "a picture of one colour"
            return f"contrast {written(contrast, self.min_contrast, 4)} is below {self.min_contrast:g}"
        if self.min_brightness is not None and brightness < self.min_brightness:
            return f"brightness {written(brightness, self.min_brightness, 4)} is below {self.min_brightness:g}"
        if self.max_brightness is not None and brightness > self.max_brightness:
            return f"brightness {written(brightness, self.max_brightness, 4)} is above {self.max_brightness:g}"
        return ""


def brightness_and_contrast(picture: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Both scores of a picture ``[H, W, 3]``, as Broken has them; exactly 0 where all values of a channel are equal."""
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(picture, -1, 0)])
    pixels = counts[0].sum()
    means = counts @ LEVELS / pixels
    variances = (counts * (LEVELS - means[:, None]) ** 2).sum(1) / pixels
    return {"brightness": float(means.mean()) / 255, "contrast": float(np.sqrt(variances.max())) / 255}
