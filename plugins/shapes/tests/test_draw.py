from __future__ import annotations

import numpy as np
import pytest

from latentmill_shapes.draw import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    all_scenes,
    distance,
    draw,
    held_out_scenes,
    is_held_out,
    training_scenes,
)

STAR_ABOVE_RING = Scene(Thing("red", "star"), "yellow", "above", Thing("blue", "ring"))


def test_captions_read_as_english() -> None:
    assert STAR_ABOVE_RING.caption == "a red star above a blue ring on a yellow background"
    assert Scene(Thing("white", "cross"), "black").caption == "a white cross on a black background"


def test_every_scene_has_its_own_caption_and_colours_that_differ() -> None:
    scenes = all_scenes()
    assert len({s.caption for s in scenes}) == len(scenes) == 8 * 6 * 7 + 8 * 7 * 6 * 6 * 6 * 4
    for s in scenes:
        colours = [s.background, s.first.colour] + ([s.second.colour] if s.second else [])
        assert len(set(colours)) == len(colours)


def test_five_percent_are_held_out_for_ever() -> None:
    trained, held = {s.caption for s in training_scenes()}, {s.caption for s in held_out_scenes()}
    assert not trained & held
    assert len(trained) + len(held) == len(all_scenes())
    assert 0.045 <= len(held) / len(all_scenes()) <= 0.055
    # The split belongs to the weights: if the hash changes, these change.
    assert [s.caption for s in held_out_scenes()[:2]] == [
        "a red star on a cyan background",
        "a green circle on a white background",
    ]
    assert not is_held_out(STAR_ABOVE_RING)


def test_both_tellings_of_a_picture_fall_on_one_side() -> None:
    for scene in all_scenes()[::97]:
        assert is_held_out(scene) == is_held_out(scene.mirrored())
        assert scene.mirrored().mirrored() == scene


def test_drawing_is_deterministic_and_keyed_by_seed() -> None:
    scenes = list(all_scenes()[::5000])
    assert np.array_equal(draw(scenes, 3), draw(scenes, 3))
    assert not np.array_equal(draw(scenes, 3), draw(scenes, 4))
    assert np.array_equal(draw(scenes[:4], 3), draw(scenes, 3)[:4])


def test_pixels_are_the_palette_s() -> None:
    picture = draw([STAR_ABOVE_RING], 0)[0]
    assert tuple(picture[0, 0]) == COLOURS["yellow"]
    assert tuple(picture[16, 32]) == COLOURS["red"]
    assert tuple(picture[48, 32]) == COLOURS["yellow"]  # the ring's hole
    exact = (picture[..., None, :] == np.array(list(COLOURS.values()))).all(-1).any(-1)
    assert 0.85 < exact.mean() < 1  # some pixels, the edges, are in between


def test_shapes_have_the_areas_of_their_geometry() -> None:
    axis = np.linspace(-30, 30, 1201, dtype=np.float32)
    x, y, r = axis[None, :], axis[:, None], 20.0
    area = {s: float((distance(s, x, y, r) < 0).mean()) * 60**2 / r**2 for s in SHAPES}
    wedge = np.pi / 5
    exact = {
        "circle": np.pi,
        "square": 1.72**2,
        "triangle": 3 * 3**0.5 * 0.55**2,
        "star": 10 * 0.5 * 1.08 * 0.47 * np.sin(wedge),
        "ring": np.pi * (1 - 0.52**2),
        "cross": 2 * 2 * 0.64 - 0.64**2,
    }
    assert area == pytest.approx(exact, rel=0.01)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="'blob'"):
        distance("blob", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), 1.0)
