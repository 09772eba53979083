from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latentmill_shapes.draw import Scene, Thing, all_scenes, draw
from latentmill_shapes.judge import compare, read

SCENE = Scene(Thing("red", "star"), "yellow", "above", Thing("blue", "ring"))


def test_says_right_of_drawn_pictures() -> None:
    scenes = [*all_scenes()[:336:3], *all_scenes()[336::97]]
    results = [compare(s, read(p)) for s, p in zip(scenes, draw(scenes, 11), strict=True)]
    assert np.mean([r["all"] for r in results]) >= 0.995


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (replace(SCENE, background="green"), {"background"}),
        (replace(SCENE, relation="below"), {"relation"}),
        (replace(SCENE, relation="left of"), {"relation"}),
        (replace(SCENE, first=Thing("red", "cross")), {"shapes"}),
        (replace(SCENE, second=Thing("blue", "circle")), {"shapes"}),
        (replace(SCENE, first=Thing("red", "ring"), second=Thing("blue", "star")), {"shapes"}),
        (replace(SCENE, second=Thing("purple", "ring")), {"colours", "shapes", "relation"}),
        (replace(SCENE, first=Thing("blue", "star"), second=Thing("red", "ring")), {"shapes", "relation"}),
        (Scene(SCENE.first, "yellow"), {"colours"}),
    ],
)
def test_says_what_is_wrong(other: Scene, wrong: set[str]) -> None:
    result = compare(other, read(draw([SCENE], 0)[0]))
    assert {name for name, right in result.items() if not right} == wrong | {"all"}


def test_tells_every_shape_from_every_other_at_every_size() -> None:
    scenes = [s for s in all_scenes() if s.first.colour == "green" and s.background == "purple"]
    scenes = [s for s in scenes if s.second is None or s.second.colour == "white"]
    for scene, picture in zip(scenes, draw(scenes, 5), strict=True):
        assert compare(scene, read(picture))["all"], scene.caption


def test_a_blot_is_no_shape_and_a_third_thing_is_wrong() -> None:
    picture = draw([Scene(Thing("red", "square"), "white")], 0)[0]
    blot = picture.copy()
    blot[:, 28:36] = (240, 240, 240)  # cut the square in two
    assert [t.shape for t in read(blot).things] == [None]
    third = picture.copy()
    third[2:10, 2:10] = (40, 70, 210)
    assert not compare(Scene(Thing("red", "square"), "white"), read(third))["colours"]


def test_a_border_of_no_known_colour_is_no_background() -> None:
    assert read(np.full((64, 64, 3), 128, dtype=np.uint8)).background is None


def test_noise_up_to_what_an_autoencoder_adds_changes_nothing() -> None:
    scenes = list(all_scenes()[336::1500])
    rng = np.random.default_rng(0)
    noisy = np.clip(draw(scenes, 0) + rng.normal(0, 7, (len(scenes), 64, 64, 3)), 0, 255).astype(np.uint8)
    assert all(compare(s, read(p))["all"] for s, p in zip(scenes, noisy, strict=True))
