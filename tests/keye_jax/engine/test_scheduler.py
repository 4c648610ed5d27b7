"""The rules of the scheduler, one by one, and random traces of requests."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keye_jax.engine.plan import Arrival, Begin, Cancel, Ended, Event, Failed, Measured, Plan, Read, Ready
from keye_jax.engine.scheduler import AGEING_STEPS, MOST_DECODES, RARE_GAP, Scheduler
from keye_jax.errors import UserError
from tests import fuzz_scheduler
from tests.keye_jax.engine.schedules import chunks, come, scheduler, steps, until_idle

DECODE = Measured(0.01, None, decode=True)
ROOT = Path(__file__).parents[3]


class TestOneSequence:
    def test_it_is_read_then_decodes_and_leaves(self):
        engine = scheduler()
        plans = until_idle(engine, *come("a", prompt=300, most=3))
        pages = (0, 1, 2, 3, 4)
        assert plans == [
            Plan(reads=(Read("a", "large", 0, 256, pages, last=False),), cached=(("a", 0),)),
            # The first token is drawn from the logits of the chunk, the second one by the decode step after it.
            Plan(
                reads=(Read("a", "small", 256, 44, pages, last=True),),
                begin=(Begin("a", 0, pages, 300),),
                rows=((0, "a"),),
            ),
            Plan(rows=((0, "a"),), ended=("a",)),
            Plan(clear=(0,)),
            Plan(),
        ]

    def test_one_token_is_drawn_without_decoding(self):
        engine = scheduler()
        plan = engine.step(come("a", prompt=10, most=1))
        assert plan.begin and not plan.decode and plan.ended == ("a",)
        assert engine.step() == Plan(clear=(0,))

    def test_an_end_token_idles_the_row_before_its_pages_are_given_away(self):
        engine = scheduler(rows=1, pages_per_shard=4)
        engine.step([*come("a", prompt=100, most=100), *come("b", prompt=200, most=50)])
        assert engine.step([]).rows == ((0, "a"),)
        plan = engine.step([Ended("a")])
        assert (
            plan.clear == (0,) and plan.reads and plan.reads[0].id == "b" and set(plan.reads[0].pages) == {0, 1, 2, 3}
        )

    def test_what_comes_about_a_sequence_that_has_gone_is_ignored(self):
        engine = scheduler()
        until_idle(engine, *come("a", prompt=10, most=2))
        assert engine.step([Ended("a"), Cancel("a"), Ready("a", 10), Failed("b")]) == Plan()

    @pytest.mark.parametrize("event", [Cancel("a"), Failed("a")])
    @pytest.mark.parametrize("before", range(4))
    def test_it_leaves_at_any_time(self, event: Event, before: int):
        """While it waits, is read, and decodes."""
        engine = scheduler(prefix_cache=False)
        if before:
            engine.step(come("a", prompt=600))
            steps(engine, before - 1)
        running = engine.stats.running
        plan = engine.step([*([] if before else come("a", prompt=600)), event])
        assert plan == Plan(clear=(0,) if running else ())
        assert engine.stats.free_pages == engine.stats.pages and not engine.stats.reading


class TestBudgets:
    @pytest.mark.parametrize("options", [{"max_context": 100}, {"pages_per_shard": 2, "max_context": 128}])
    def test_what_can_never_run_is_refused(self, options: dict[str, int]):
        most = options["max_context"]
        engine = scheduler(**options)
        engine.check(most - 10, 10)
        message = f"max_tokens is 11 and the prompt has {most - 10} tokens; together they must be at most {most}"
        with pytest.raises(UserError, match=message):
            engine.check(most - 10, 11)
        with pytest.raises(UserError, match=message):
            engine.step([Arrival("a", most - 10, 11)])

    def test_nothing_is_no_prompt_and_no_answer(self):
        with pytest.raises(UserError, match="prompt_tokens is 0; it must be at least 1"):
            scheduler().check(0, 10)
        with pytest.raises(UserError, match="max_tokens is 0; it must be at least 1"):
            scheduler().check(10, 0)

    def test_pages_are_reserved_for_the_whole_answer(self):
        engine = scheduler(pages_per_shard=10)
        engine.step([*come("a", 64, most=300), *come("b", 64, most=300)])
        assert not engine.step().reads and engine.stats.free_pages == 4
        assert (engine.stats.running, engine.stats.waiting) == (1, 1)
        plan = engine.step([Ended("a")])
        assert plan.reads and plan.reads[0].id == "b"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rows": 3, "homes": 2}, "rows is 3; it must be a positive multiple of 2"),
            ({"small": 100}, "small is 100; it must be a positive multiple of 64"),
            ({"large": 300}, "large is 300; it must be a positive multiple of 64"),
            ({"large": 0}, "large is 0; it must be a positive multiple of 64"),
            ({"prompts_together": 0}, "prompts_together is 0; it must be from 1 to 4"),
            ({"prompts_together": 5}, "prompts_together is 5; it must be from 1 to 4"),
            ({"chunks_between": 0}, "chunks_between is 0; it must be at least 1"),
            ({"decodes_between": -1}, "decodes_between is -1; it must be at least 1"),
            ({"target_gap_ms": 0.0}, "target_gap_ms is 0.0; it must be above 0"),
            ({"target_gap_ms": float("nan")}, "target_gap_ms is nan; it must be above 0"),
        ],
    )
    def test_settings_are_checked(self, options: dict[str, Any], message: str):
        with pytest.raises(UserError, match=message):
            scheduler(**options)


class TestTogether:
    def test_small_chunks_of_several_prompts_are_one_step(self):
        engine = scheduler(prompts_together=3)
        plan = engine.step([event for name in "abcd" for event in come(name, 40, most=2)])
        assert chunks([plan]) == [(name, 0, 40) for name in "abc"]
        assert [begin.id for begin in plan.begin] == ["a", "b", "c"] and [name for name, _ in plan.cached] == [
            "a",
            "b",
            "c",
        ]
        assert chunks([engine.step()]) == [("d", 0, 40)]

    def test_a_large_chunk_is_read_alone_and_is_not_overtaken(self):
        engine = scheduler(prompts_together=4)
        plan = engine.step([*come("a", 40), *come("b", 256), *come("c", 40)])
        assert chunks([plan]) == [("a", 0, 40)]
        assert chunks(steps(engine, 1)) == [("b", 0, 256)]

    def test_chunks_of_one_prompt_and_a_prefix_of_the_same_step(self):
        engine = scheduler(prompts_together=4)
        plan = engine.step([*come("a", 100, text="ab"), *come("b", 100, text="a")])
        assert chunks([plan]) == [("a", 0, 64), ("a", 64, 36), ("b", 64, 36)]
        assert plan.cached == (("a", 0), ("b", 64)) and plan.reads[2].pages[0] == plan.reads[0].pages[0]


class TestOrder:
    def test_fewest_chunks_go_first(self):
        engine = scheduler()
        plans = until_idle(engine, *come("long", 600), *come("short", 60), *come("middle", 300))
        order = [name for name, _ in itertools.groupby(name for name, _, _ in chunks(plans))]
        assert order == ["short", "middle", "long"]

    def test_a_short_prompt_overtakes_a_long_one_between_its_chunks(self):
        engine = scheduler()
        engine.step(come("long", 1500))
        engine.step(come("short", 60))
        assert engine.stats.running == 1 and engine.stats.reading == 1

    def test_a_prompt_that_is_not_ready_blocks_nobody(self):
        engine = scheduler()
        plans = [engine.step([*come("a", 60, ready=59), *come("b", 600, ready=300)]), *steps(engine, 3)]
        # A chunk is read when all of it is ready.
        assert chunks(plans) == [("b", 0, 256)]
        plans = [engine.step([Ready("b", 512)]), engine.step([Ready("a", 60)])]
        assert chunks(plans) == [("b", 256, 256), ("a", 0, 60)]

    def test_a_long_prompt_waits_for_a_bounded_number_of_short_ones(self):
        engine = scheduler()
        engine.step(come("long", 1000))
        assert engine.stats.reading == 1
        short = 0
        while not any(begin.id == "long" for begin in engine.step(come(f"s{short}", 60, most=1)).begin):
            short += 1
            # Six chunks are left. The first of them has its turn after this number of steps.
            assert short <= 6 * AGEING_STEPS + 6

    def test_pages_are_left_for_a_prompt_whose_turn_has_come(self):
        """It needs all pages. Those that come later would take some for ever."""
        engine = scheduler(pages_per_shard=20)
        engine.step(come("s", 60, most=60))
        engine.step(come("large", 600, most=680))
        step = 0
        while "large" not in dict(engine.step(come(f"s{step}", 60, most=60) if step % 20 == 0 else []).cached):
            step += 1
            assert step < 1000
        # It has four chunks. From its turn on it waits for those that are there.
        assert 4 * AGEING_STEPS < step <= 4 * AGEING_STEPS + 61

    def test_a_prompt_without_room_is_passed_over_until_then(self):
        engine = scheduler(pages_per_shard=20)
        engine.step(come("a", 60, most=500))
        plan = engine.step([*come("large", 600, most=680), *come("b", 60, most=500)])
        assert plan.reads and plan.reads[0].id == "b"

    def test_all_rows_taken(self):
        engine = scheduler(rows=1)
        engine.step([*come("a", 60, most=100), *come("b", 60)])
        assert not engine.step().reads and engine.stats.waiting == 1


class TestTurnsOfReadingAndDecoding:
    """One sequence runs while a prompt of eight large chunks is read."""

    def plans(self, engine: Scheduler, count: int = 12) -> str:
        """What each step does: R reads, D decodes, B does both."""
        engine.step(come("runs", 60, most=1000))
        engine.step()
        plans = [engine.step(come("read", 8 * 256, most=1)), *steps(engine, count - 1)]
        return "".join("B" if plan.reads and plan.decode else "R" if plan.reads else "D" for plan in plans)

    def engine(self, **options: Any) -> Scheduler:
        return scheduler(max_context=3000, pages_per_shard=60, **options)

    def test_a_chunk_between_two_decode_steps(self):
        assert self.plans(self.engine()) == "BBBBBBBBDDDD"

    def test_more_decode_steps_between_chunks(self):
        assert self.plans(self.engine(decodes_between=3)) == "DBDDBDDBDDBD"

    def test_more_chunks_between_decode_steps(self):
        assert self.plans(self.engine(chunks_between=3)) == "RRBRRBRRDDDD"

    def test_both(self):
        assert self.plans(self.engine(chunks_between=2, decodes_between=3)) == "DDRBDDRBDDRB"

    def test_without_running_sequences_chunks_follow_each_other(self):
        engine = self.engine(decodes_between=5)
        assert len(chunks([engine.step(come("a", 8 * 256)), *steps(engine, 7)])) == 8


class TestTargetGap:
    """Decode steps of 10 ms, and chunks of the given milliseconds."""

    @pytest.mark.parametrize(
        ("chunk", "target", "decodes"),
        [
            (50, 100, 1),  # every gap is short enough
            (90, 100, 1),
            (95, 100, RARE_GAP),  # gaps with a chunk are too long, so they are rare
            (300, 20, 30),  # 30 steps of 10 ms and a chunk of 300 ms make a mean of 20 ms
            (500, 11, MOST_DECODES),
            (500, 5, MOST_DECODES),  # decoding alone is too slow
        ],
    )
    def test_decode_steps_between_chunks(self, chunk: int, target: float, decodes: int):
        engine = scheduler(target_gap_ms=target, max_context=3000, pages_per_shard=60)
        engine.step([*come("runs", 60, most=1000), DECODE, Measured(chunk / 1e3, "large", decode=False)])
        plans = [engine.step(come("read", 8 * 256, most=1)), *steps(engine, 250)]
        first, second = [step for step, plan in enumerate(plans) if plan.reads][:2]
        assert second - first == decodes

    def test_each_program_by_its_own_time(self):
        engine = scheduler(target_gap_ms=100, decodes_between=2)
        chunks_took = [Measured(1, "large", decode=False), Measured(0.02, "small", decode=False)]
        engine.step([*come("runs", 60, most=500), DECODE, *chunks_took])
        plans = [engine.step(come("read", 256 + 128, most=1)), *steps(engine, 40)]
        first, second, third = [step for step, plan in enumerate(plans) if plan.reads]
        assert first == RARE_GAP - 1 and second - first == third - second == 2

    def test_a_step_that_reads_and_decodes_tells_of_the_chunk_too(self):
        engine = scheduler(target_gap_ms=100, max_context=3000, pages_per_shard=60)
        engine.step([*come("runs", 60, most=1000), DECODE, Measured(0.095, "large", decode=True)])
        plans = [engine.step(come("read", 4 * 256, most=1)), *steps(engine, 3)]
        assert len(chunks(plans)) == 4

    def test_measurements_are_smoothed(self):
        """After chunks of 70 ms one of 140 ms changes nothing yet, but three do."""
        engine = scheduler(target_gap_ms=100, max_context=3000, pages_per_shard=60)
        slow = Measured(0.14, "large", decode=False)
        engine.step([*come("runs", 60, most=1000), DECODE, Measured(0.07, "large", decode=False), slow])
        plans = [engine.step(come("read", 4 * 256, most=1)), *steps(engine, 3)]
        assert len(chunks(plans)) == 4
        plans = [engine.step([*come("b", 8 * 256, most=1), slow, slow]), *steps(engine, 9)]
        assert len(chunks(plans)) < 2


def test_stats():
    engine = scheduler(rows=1)
    engine.step([*come("a", 330, text="abcde"), *come("b", 600)])
    stats = engine.stats
    assert (stats.waiting, stats.reading, stats.running, stats.offloaded) == (1, 1, 0, 0)
    assert (stats.pages, stats.free_pages, stats.cached_pages) == (40, 34, 0)
    engine.step([Cancel("a")])
    assert (engine.stats.cached_pages, engine.stats.prompt_tokens) == (4, 930)


@pytest.mark.parametrize("numbers", [range(first, first + 50) for first in range(0, 300, 50)], ids=lambda each: each[0])
def test_random_traces(numbers: range):
    for number in numbers:
        _, _, found = fuzz_scheduler.run(1, number)
        assert not found, f"trace {number}, seed 1:\n{found}"


def test_plans_do_not_depend_on_the_process():
    """Nothing goes by the order of a set of strings, which differs between processes."""
    command = [sys.executable, "-m", "tests.fuzz_scheduler", "--traces", "10", "--jobs", "1"]
    outputs = [
        subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]
    assert outputs[0].stdout == outputs[1].stdout and "plans" in outputs[0].stdout


def test_it_needs_no_jax():
    code = "import sys, keye_jax.engine.scheduler; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
