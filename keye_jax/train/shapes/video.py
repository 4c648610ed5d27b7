"""Scenes as video files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keye_jax.errors import UserError
from keye_jax.train.shapes.draw import draw, scene_arrays, to_uint8
from keye_jax.train.shapes.scene import SIDE, Scene, clip_frames

_CRF = 28
"""H.264's constant rate factor: higher is worse; 23 is the usual one."""


def clip_pixels(scene: Scene, scale: int = 1) -> np.ndarray:
    """All frames of a scene's clip, drawn by NumPy, uint8 [frames, scale * SIDE, scale * SIDE, 3]."""
    times = np.arange(clip_frames(len(scene.times), scene.rate)) / scene.rate
    return to_uint8(np, draw(np, scene_arrays([scene], [times.tolist()])[0], scale))


def write_video(path: str | Path, scene: Scene, *, scale: int = 1, crf: int = _CRF) -> None:
    """Writes a scene as an H.264 clip.

    Args:
      path: the file. The end of its name, such as .mp4 or .mkv, decides the format.
      scale: pixels of a frame for one pixel of the scene, whose frames have `SIDE`.
      crf: H.264's constant rate factor, from 0 to 51; higher is worse.

    Raises:
      UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("clips are written as video, which needs PyAV: pip install 'keye-jax[video]'") from error

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(scene.rate))
        stream.width = stream.height = scale * SIDE
        stream.pix_fmt = "yuv420p"
        # One thread: with more, the file depends on their number.
        stream.options = {"preset": "veryfast", "crf": str(crf), "threads": "1", "g": str(round(4 * scene.rate))}
        for pixels in clip_pixels(scene, scale):
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
