import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.processor.image import patchify
from keye_jax.train.shapes.batches import frame_patches
from keye_jax.train.shapes.damage import damage
from keye_jax.train.shapes.draw import draw, scene_arrays, to_uint8
from keye_jax.train.shapes.glyphs import atlas
from keye_jax.train.shapes.scene import COLOURS, SHAPES, SIDE, Object, Scene, SceneOptions, Span, make_scene

OPTIONS = SceneOptions(frames=8, needle=1.0)


def pixels(scene, scale=1):
    return to_uint8(np, draw(np, scene_arrays([scene])[0], scale))


def test_numpy_and_jax_draw_the_same():
    arrays = scene_arrays([make_scene(1, OPTIONS, number=number) for number in range(3)])
    drawn = jax.jit(jax.vmap(lambda scene: draw(jnp, scene)))(arrays)
    for number, frames in enumerate(np.asarray(drawn)):
        np.testing.assert_allclose(frames, draw(np, arrays[number]), atol=1)


def test_objects_are_seen_when_and_where_they_are_in_their_colours(scene):
    frames = pixels(scene)
    assert frames.shape == (16, SIDE, SIDE, 3)
    background = frames[0, 84, 40]
    for frame in range(16):
        for each, (x, y) in zip(scene.objects, ((40, 84), (84, 84), (128 + 15, 84)), strict=True):
            colour = each.colour_at(frame)
            np.testing.assert_array_equal(frames[frame, y, x], COLOURS[colour] if colour else background)


def test_the_word_and_the_clock_are_written_when_they_are_shown(scene):
    frames = pixels(scene).astype(int)
    inked = (frames[:, :36].max((1, 2, 3)) > 200).tolist()
    assert inked == [3 <= frame <= 8 for frame in range(16)]
    clocks = [frame[132:].tobytes() for frame in frames]
    shown = [scene.clock_at(frame) for frame in range(16)]
    for one in range(16):
        for two in range(16):
            assert (clocks[one] == clocks[two]) == (shown[one] == shown[two])


def test_all_shapes_and_all_glyphs_look_different():
    times = (0.0, 0.5)

    def frame(shape):
        shown = Object(shape, (Span(0, 1, "white"),), radius=20.0)
        return pixels(Scene(2.0, times, (shown,), "moon", (0, 1), 0.5))[0].astype(int)

    pictures = [frame(shape) for shape in SHAPES]
    for number, one in enumerate(pictures):
        assert all(np.count_nonzero(np.abs(one - two).max(-1) > 100) > 50 for two in pictures[:number])
    glyphs = atlas(1)
    for kind in (glyphs[:11], glyphs[11:]):  # an S may look like a 5: the word has no digits, and the clock no letters
        for number, one in enumerate(kind):
            assert one.max() == 1 and all(np.abs(one - two).sum() > 8 for two in kind[:number])


def test_a_larger_frame_shows_the_same():
    scene = make_scene(2, OPTIONS)
    large = pixels(scene, 2).reshape(8, SIDE, 2, SIDE, 2, 3).mean((2, 4))
    assert np.abs(large - pixels(scene)).mean() < 1


def test_damage_is_of_every_strength_and_leaves_the_picture():
    frames = draw(np, scene_arrays([make_scene(3, OPTIONS)])[0])[4:5, 32:]
    damaged = jax.jit(jax.vmap(damage, (None, 0)))(frames, jax.random.split(jax.random.key(0), 24))
    errors = np.abs(np.asarray(damaged) - frames).mean((1, 2, 3, 4))
    assert errors.min() < 1.5 and 3 < errors.max() < 15
    # A hard edge between two colours is no longer there: colours have half the resolution.
    edge = jnp.zeros((1, 16, 16, 3)).at[:, :, :7].set(jnp.array(COLOURS["red"]))
    assert np.asarray(damage(edge, jax.random.key(1)))[0, 8, 7, 0] > 20


def test_patches_are_in_the_processors_order():
    scenes = scene_arrays([make_scene(4, OPTIONS, number=number) for number in range(2)])
    patches = np.asarray(frame_patches(scenes, jax.random.key(0)))
    assert patches.shape == (16, 144, 588) and patches.dtype == np.uint8
    whole = np.concatenate([patchify(frame, 14) for frame in to_uint8(np, draw(np, scenes[1]))])
    assert np.abs(patches[8:].reshape(-1, 3, 14, 14).astype(int) - whole).mean() < 15
