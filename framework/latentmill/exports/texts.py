"""Whose encodings of prompts a dataset's are: told by their names and shapes, as VAEs are by their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OWN_WAYS = ("clip_skip", "compel")
"""Settings of a text encoder with which it makes something else than any trainer does."""


@dataclass(frozen=True, eq=False)
class TextFamily:
    """Text encoders that one kind of denoiser is trained with, as our jobs store what they make."""

    name: str
    about: str
    shapes: Mapping[str, tuple[int, ...]]
    """By name of conditioning. Of a prompt that is shorter than ``embeds``, ``length`` says how many tokens it has, where it is there."""
    made_with: str = ""
    """What has to be set so that they get these shapes."""


TEXT_FAMILIES: dict[str, TextFamily] = {
    family.name: family
    for family in (
        TextFamily("sdxl", "Stable Diffusion XL", {"embeds": (77, 2048), "pooled": (1280,)}),
        TextFamily("sd3", "Stable Diffusion 3 and 3.5", {"embeds": (333, 4096), "pooled": (2048,)}),
        TextFamily("flux", "FLUX.1", {"embeds": (512, 4096), "pooled": (768,)}),
        TextFamily("lumina-2", "Lumina 2", {"embeds": (256, 2304), "mask": (256,)}),
        TextFamily("z-image", "Z-Image", {"embeds": (512, 2560), "length": ()}),
        TextFamily("qwen-image", "Qwen-Image", {"embeds": (1024, 3584), "length": ()}, "text_encoder.max_length=1024"),
    )
}
"""By name. Qwen-Image's pipeline takes 512 tokens unless told otherwise, and trainers 1024."""


@dataclass(frozen=True)
class StoredText:
    """The encodings that a dataset holds."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of ``prompt:*``, without the prefix."""
    own_ways: tuple[str, ...] = ()
    """Of OWN_WAYS, those that they were made with."""

    @property
    def family(self) -> TextFamily | None:
        """None if no trainer that is known here has such."""
        fitting = (each for each in TEXT_FAMILIES.values() if each.shapes == self.shapes)
        return None if self.own_ways else next(fitting, None)

    def __str__(self) -> str:
        with_what = "".join(f", made with text_encoder.{setting}" for setting in self.own_ways)
        return shapes_in_words(self.shapes) + with_what


def stored_text(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> StoredText:
    """Encodings of these shapes, by the config of the plan that they were made with."""
    settings = config.get("text_encoder") or {}
    return StoredText(shapes, tuple(setting for setting in OWN_WAYS if settings.get(setting)))


def shapes_in_words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names with their shapes, for people.

    >>> shapes_in_words(TEXT_FAMILIES["z-image"].shapes)
    'embeds [512, 2560], length'
    """
    return ", ".join(f"{name} {[*shape]}" if shape else name for name, shape in sorted(shapes.items()))
