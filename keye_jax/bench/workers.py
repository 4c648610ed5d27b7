"""`python -m keye_jax.bench.workers`: how fast worker processes decode videos, and the memory that it takes.

Several requests, each with a clip of its own, are decoded at once by 1, 2 or more workers. Pieces are released as soon as
they come. The clock begins when all requests are planned. Then the memory for one long clip is measured. All figures of
memory are those of this process and its workers together, above what they take when they wait; Linux tells them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from keye_jax.bench.media import CALM, MOTION, find_ffmpeg, make_clip
from keye_jax.config import KeyeConfig
from keye_jax.engine.media import BYTE_BUDGET, Broken, Finished, MediaWorkers, Pixels, Planned
from keye_jax.presets import TINY
from keye_jax.processor import Processor
from keye_jax.testing import write_processor_files


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What it took to decode several videos.

    Attributes:
      frames: how many the model sees of them together.
      seconds: from the first `decode` to the end of the last request.
      first_piece: seconds until the first frames were there.
      plan_seconds: for planning all of them.
      shared_bytes: of shared memory, at most.
      peak_bytes: of memory, at most, above idle.
    """

    frames: int
    seconds: float
    first_piece: float
    plan_seconds: float
    shared_bytes: int
    peak_bytes: int


def decode_videos(processor: Processor, videos: list[Path], processes: int, byte_budget: int) -> Decoding:
    """Decodes one request a video.

    Raises:
      RuntimeError: a video cannot be decoded.
    """
    with MediaWorkers(processor, processes, byte_budget) as workers:
        idle = _settled(workers)
        begin = time.perf_counter()
        for index, video in enumerate(videos):
            part = {"type": "video", "video": str(video.absolute())}
            workers.submit(index, [{"role": "user", "content": [part]}])
        frames = sum(event.prompt.media[0].frames for event in _events(workers, Planned, len(videos)))
        planned = time.perf_counter()
        for index in range(len(videos)):
            workers.decode(index)
        first, peak, looked = 0.0, 0, 0.0
        for event in _events(workers, Finished, len(videos)):
            now = time.perf_counter()
            if isinstance(event, Pixels):
                first = first or now - planned
                event.release()
            if now - looked > 0.2:
                peak, looked = max(peak, _memory(workers)), now
        seconds = time.perf_counter() - planned
        return Decoding(frames, seconds, first, planned - begin, workers.arena.peak, peak - idle)


def _events(workers: MediaWorkers, kind: type, count: int) -> Iterator[Planned | Pixels | Finished]:
    """Events until so many of one kind have come."""
    while count:
        for event in workers.poll():
            if isinstance(event, Broken):
                raise RuntimeError(event.message)
            count -= isinstance(event, kind)
            yield event
        time.sleep(0.001)


def _settled(workers: MediaWorkers) -> int:
    """The memory in bytes when all workers have started and wait."""
    last = -1
    while (memory := _memory(workers)) != last or not workers.worker_pids:
        last = memory
        time.sleep(1)
    return memory


def _memory(workers: MediaWorkers) -> int:
    """Bytes of memory of this process and its workers, in which memory that they share counts once."""
    total = 0
    for pid in ("self", *map(str, workers.worker_pids)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def main() -> int:
    """Parses the command line, makes the clips, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.workers", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of workers")
    parser.add_argument("--videos", type=int, default=4, help="clips that are decoded")
    parser.add_argument("--seconds", type=float, default=120, help="length of each of them")
    parser.add_argument("--long-seconds", type=float, default=7200, help="length of the clip for memory; 0 for none")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="times that each is measured, in turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        folder = Path(directory)
        config = KeyeConfig.from_file(TINY)
        write_processor_files(folder / "checkpoint", config)
        processor = Processor.from_checkpoint(folder / "checkpoint", config)
        ffmpeg = find_ffmpeg()
        clip = folder / "clip.mp4"
        make_clip(ffmpeg, clip, MOTION, arguments.seconds, 23)
        videos = [clip] * arguments.videos
        found: dict[int, list[Decoding]] = {processes: [] for processes in arguments.processes}
        for _ in range(arguments.runs):
            for processes, runs in found.items():
                runs.append(decode_videos(processor, videos, processes, BYTE_BUDGET))
        print(f"{arguments.videos} clips of {arguments.seconds:g} s, medians of {arguments.runs} runs")
        print(f"{'workers':>8} {'frames/s':>9} {'x real time':>12} {'first frames s':>15} {'peak MiB':>9}   runs")
        for processes, runs in found.items():
            rates = [run.frames / run.seconds for run in runs]
            speed = statistics.median(len(videos) * arguments.seconds / run.seconds for run in runs)
            first = statistics.median(run.first_piece for run in runs)
            peak = max(run.peak_bytes for run in runs) / 2**20
            each = ", ".join(f"{rate:.1f}" for rate in rates)
            print(f"{processes:8} {statistics.median(rates):9.1f} {speed:12.1f} {first:15.2f} {peak:9.0f}   {each}")
        if arguments.long_seconds:
            make_clip(ffmpeg, clip, CALM, arguments.long_seconds, 35)
            run = decode_videos(processor, [clip], 1, BYTE_BUDGET)
            print(
                f"{arguments.long_seconds:g} s: {run.frames:,} frames in {run.seconds:.1f} s, the first after "
                f"{run.first_piece:.2f} s, planned in {run.plan_seconds:.1f} s, peak {run.peak_bytes / 2**20:.0f} MiB "
                f"above idle, of which {run.shared_bytes / 2**20:.0f} MiB are shared"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
