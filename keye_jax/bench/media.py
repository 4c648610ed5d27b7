"""`python -m keye_jax.bench.media`: the CPU time and the memory of reading a video, beside ffmpeg.

ffmpeg and the processor take the same frames of a clip of ten minutes at the same size. CPU time is user and system
time of a whole process, with its start. The peak memory of the processor is measured for a clip of two hours too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_HD = "1280x720"
# A textured picture under a moving camera, a moving pattern before it, and the grain of a film.
MOTION = (
    f"color=gray:size=2560x1440:rate=30,trim=end_frame=1,noise=alls=100,gblur=2,eq=contrast=3,loop=-1:1,setpts=N/30/TB,"
    f"crop={_HD.replace('x', ':')}:640+600*sin(t):360+340*sin(t/1.7)[ground];"
    "testsrc2=size=480x270:rate=30[pattern];"
    "[ground][pattern]overlay=400+380*cos(t/2):225+200*sin(t/3),noise=alls=5:allf=t,format=yuv420p"
)
CALM = f"testsrc2=size={_HD}:rate=25,format=yuv420p"
# Seconds of a clip that are encoded; the rest repeats them.
_PART = 20


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
      cpu_seconds: user and system time.
      seconds: from its start to its end.
      peak_bytes: largest resident memory.
      output: what it printed.
    """

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    output: str


def read_video(video: str, checkpoint: str, *, one_thread: bool) -> None:
    """Reads a video as a request for it does, and prints a JSON object about it: the work of one measured process.

    Args:
      video: the file.
      checkpoint: a folder with the processor's files for the tiny model.
      one_thread: whether the process may use only one of the processors, so that libraries start one thread.
    """
    if one_thread:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import numpy as np

    from keye_jax import presets
    from keye_jax.config import KeyeConfig
    from keye_jax.processor import Processor

    processor = Processor.from_checkpoint(checkpoint, KeyeConfig.from_file(presets.TINY))
    plan = processor.plan([{"role": "user", "content": [{"type": "video", "video": str(Path(video).absolute())}]}])
    inputs = processor.process(plan)
    (times,) = inputs.frame_times
    arrays = [value for value in vars(inputs).values() if isinstance(value, np.ndarray)]
    result = {
        "frames": len(times),
        "rate": (len(times) - 1) / float(times[-1] - times[0]),
        "height": plan.videos[0].height,
        "width": plan.videos[0].width,
        "input_bytes": sum(array.nbytes for array in [*arrays, times]),
    }
    print(json.dumps(result))


def measure(command: list[str]) -> Usage:
    """Runs a command to its end.

    Raises:
      subprocess.CalledProcessError: it fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Usage(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, peak, output)


def make_clip(ffmpeg: str, path: Path, source: str, seconds: float, quality: int) -> None:
    """Writes an H.264 clip with B-frames.

    Args:
      source: a filter graph of ffmpeg that draws it. Its first 20 s are repeated.
      seconds: length of the clip, rounded to a multiple of 20 if it is longer than that.
      quality: x264's constant rate factor.
    """
    part = path.with_name(f"part-{path.name}")
    quiet = [ffmpeg, "-nostdin", "-y", "-v", "error"]
    length = min(seconds, _PART)
    encode = ["-t", str(length), "-c:v", "libx264", "-crf", str(quality), str(part)]
    measure([*quiet, "-f", "lavfi", "-i", source, *encode])
    measure([*quiet, "-stream_loop", str(round(seconds / length) - 1), "-i", str(part), "-c", "copy", str(path)])
    part.unlink()


def main() -> int:
    """Parses the command line, makes the clips, measures and prints."""
    from keye_jax import presets
    from keye_jax.config import KeyeConfig
    from keye_jax.testing import write_processor_files

    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.media", description=__doc__)
    parser.add_argument("--video", type=Path, metavar="FILE", help="measure this video beside ffmpeg, not a made clip")
    parser.add_argument("--seconds", type=float, default=600, help="length of the clip that is made")
    parser.add_argument("--long-seconds", type=float, default=7200, help="length of the clip for memory; 0 for none")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="times that each is measured, in turns")
    arguments = parser.parse_args()
    if arguments.video and not arguments.video.is_file():
        parser.error(f"--video is {str(arguments.video)!r}; it must be a file")
    ffmpeg = find_ffmpeg()
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        folder = Path(directory)
        write_processor_files(folder / "checkpoint", KeyeConfig.from_file(presets.TINY))
        video = arguments.video
        if not video:
            video = folder / "clip.mp4"
            make_clip(ffmpeg, video, MOTION, arguments.seconds, 23)
        _compare(ffmpeg, video, folder / "checkpoint", arguments.runs)
        if arguments.long_seconds:
            video = folder / "long.mp4"
            make_clip(ffmpeg, video, CALM, arguments.long_seconds, 35)
            usage = measure(_ours(video, folder / "checkpoint", one_thread=False))
            _print_memory(f"{arguments.long_seconds:g} s", usage)
    return 0


def find_ffmpeg() -> str:
    """The ffmpeg on the PATH, or else the one of imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def _ours(video: Path, checkpoint: Path, *, one_thread: bool) -> list[str]:
    call = f"read_video({str(video)!r}, {str(checkpoint)!r}, one_thread={one_thread})"
    return [sys.executable, "-c", f"from keye_jax.bench.media import read_video; {call}"]


def _compare(ffmpeg: str, video: Path, checkpoint: Path, runs: int) -> None:
    """Measures the processor and ffmpeg in turns, and prints the medians."""
    used: dict[str, list[Usage]] = {}
    read: dict[str, Any] = {}
    # macOS cannot keep a process on one processor.
    alone = ["keye-jax, one thread"] if hasattr(os, "sched_setaffinity") else []
    for _ in range(runs):
        for name in ("keye-jax", "ffmpeg -threads 1", *alone):
            if name.startswith("ffmpeg"):
                # Sound is left out, as the processor leaves it out.
                filters = f"fps={read['rate']:.2g},scale={read['width']}:{read['height']}"
                command = [ffmpeg, "-nostdin", "-v", "error", "-threads", "1", "-i", str(video)]
                usage = measure([*command, "-an", "-vf", filters, "-f", "null", "-"])
            else:
                usage = measure(_ours(video, checkpoint, one_thread=name.endswith("one thread")))
                read = json.loads(usage.output)
            used.setdefault(name, []).append(usage)
    print(f"{video.name}: {read['frames']:,} frames of {read['width']}x{read['height']}, medians of {runs} runs")
    base = statistics.median(usage.cpu_seconds for usage in used["ffmpeg -threads 1"])
    print(f"{'':>22} {'CPU s':>8} {'ratio':>6} {'wall s':>8} {'peak MiB':>9}   CPU s of each run")
    for name, usages in used.items():
        cpu, wall, peak = (
            statistics.median(getattr(usage, field) for usage in usages)
            for field in ("cpu_seconds", "seconds", "peak_bytes")
        )
        each = ", ".join(f"{usage.cpu_seconds:.2f}" for usage in usages)
        print(f"{name:>22} {cpu:8.2f} {cpu / base:6.2f} {wall:8.2f} {peak / 2**20:9.0f}   {each}")
    _print_memory(video.name, used["keye-jax"][-1])


def _print_memory(name: str, usage: Usage) -> None:
    read = json.loads(usage.output)
    frames = f"{read['frames']:,} frames of {read['width']}x{read['height']}"
    peak, given = usage.peak_bytes / 2**20, read["input_bytes"] / 2**20
    print(f"{name}: {frames}, peak {peak:.0f} MiB, of which the model's input is {given:.0f} MiB")


if __name__ == "__main__":
    raise SystemExit(main())
