"""Pages of the scheduler: prefixes that are read again, homes, and sequences that are moved to host memory."""

from __future__ import annotations

import pytest

from keye_jax.engine.plan import Cancel, Ended, Event, Placed, Read
from keye_jax.engine.scheduler import Scheduler
from tests.keye_jax.engine.schedules import chunks, come, scheduler, steps, until_idle


class TestPrefix:
    def read(self, engine: Scheduler, *events: Event) -> Read:
        """The first chunk that is read after events."""
        plan = engine.step(events)
        assert plan.reads
        return plan.reads[0]

    def test_the_same_prompt_again_reads_its_last_chunk_only(self):
        engine = scheduler()
        first = self.read(engine, *come("a", 330, text="abcde"))
        until_idle(engine)
        # 256 tokens by the large program, 64 by the small one, and ten that are no whole block.
        plan = engine.step(come("b", 330, text="abcde"))
        assert plan.cached == (("b", 320),) and plan.reads
        assert (plan.reads[0].start, plan.reads[0].count, plan.reads[0].last) == (320, 10, True)
        assert plan.reads[0].pages[:5] == first.pages[:5]
        assert (engine.stats.cached_tokens, engine.stats.prompt_tokens) == (320, 660)

    @pytest.mark.parametrize(("prompt", "start"), [(320, 256), (256, 0), (512, 256)])
    def test_a_last_chunk_is_always_read(self, prompt: int, start: int):
        engine = scheduler()
        text = "abcdefgh"[: prompt // 64]
        until_idle(engine, *come("a", prompt, text=text))
        assert self.read(engine, *come("b", prompt, text=text)).start == start

    def test_blocks_of_the_other_program_are_not_reused(self):
        engine = scheduler()
        until_idle(engine, *come("short", 200, text="abc"))
        # Alone it would read the first 256 tokens at once.
        assert self.read(engine, *come("long", 300, text="abcd")).start == 0
        until_idle(engine)
        assert self.read(engine, *come("short again", 200, text="abc")).start == 192

    def test_reuse_does_not_end_within_a_large_chunk(self):
        engine = scheduler()
        until_idle(engine, *come("a", 600, text="abcdefghi"))
        # They share six blocks, but a large chunk ends after four.
        assert self.read(engine, *come("b", 600, text="abcdefxyz")).start == 256
        until_idle(engine)
        assert self.read(engine, *come("c", 500, text="abcdefg")).start == 256

    def test_the_next_turn_of_a_conversation(self):
        engine = scheduler()
        until_idle(engine, *come("a", 300, most=100, text="abcd"))
        # The answer was written by decoding, so it is read.
        assert self.read(engine, *come("b", 450, text="abcdxyz")).start == 256

    def test_n_choices_read_their_prompt_once(self):
        engine = scheduler()
        plans = until_idle(engine, *(event for index in range(4) for event in come(f"c{index}", 600, text="abcdefghi")))
        assert [cached for plan in plans for _, cached in plan.cached] == [0, 576, 576, 576]
        assert sum(count for _, _, count in chunks(plans)) == 600 + 3 * 24

    def test_a_prompt_that_is_read_halfway_can_be_shared(self):
        engine = scheduler()
        engine.step(come("a", 600, text="abcdefghi"))
        engine.step([Cancel("a")])
        assert self.read(engine, *come("b", 600, text="abcdefghi")).start == 256

    def test_a_prefix_draws_its_sequence_to_its_home(self):
        engine = scheduler(homes=2)
        assert self.read(engine, *come("a", 320, most=100, text="abcde")).pages[0] < 40
        plan = engine.step()
        # Home 1 has more room, but home 0 has the prefix.
        plan = engine.step(come("b", 330, text="abcde"))
        assert plan.cached == (("b", 320),) and plan.begin[0].row == 1
        # Without free rows there, nothing is reused.
        plan = engine.step(come("c", 330, text="abcde"))
        assert plan.cached == (("c", 0),) and plan.reads and min(plan.reads[0].pages) >= 40

    def test_it_can_be_turned_off(self):
        engine = scheduler(prefix_cache=False)
        until_idle(engine, *come("a", 330, text="abcde"))
        assert self.read(engine, *come("b", 330, text="abcde")).start == 0
        assert engine.stats.cached_pages == 0

    def test_cached_prefixes_make_room(self):
        engine = scheduler(pages_per_shard=8)
        until_idle(engine, *come("a", 450, most=1, text="abcdefg"))
        assert (engine.stats.free_pages, engine.stats.cached_pages) == (1, 7)
        until_idle(engine, *come("b", 450, most=1))
        assert (engine.stats.free_pages, engine.stats.cached_pages) == (8, 0)


class TestHomes:
    def test_sequences_go_where_there_is_most_room(self):
        engine = scheduler(homes=2, pages_per_shard=10)
        plans = [engine.step([*come("a", 60, most=400), *come("b", 60, most=1), *come("c", 60)]), *steps(engine, 2)]
        # The first two rows are on home 0.
        assert [begin.row for plan in plans for begin in plan.begin] == [0, 2, 2]

    def test_pages_take_turns(self):
        engine = scheduler(turns=2, pages_per_shard=10)
        plan = engine.step(come("a", 250))
        assert plan.reads and [page // 10 for page in plan.reads[0].pages] == [0, 1, 0, 1, 0]


class TestOptimistic:
    """Eight pages for sequences that may need five each: one for the prompt, one a block of the answer."""

    def engine(self) -> Scheduler:
        return scheduler(pages_per_shard=8, optimistic=True)

    def test_more_are_admitted_and_they_grow(self):
        engine = self.engine()
        engine.step([*come("a", 64, most=256), *come("b", 64, most=256)])
        engine.step()
        assert (engine.stats.running, engine.stats.free_pages) == (2, 4)
        plans = steps(engine, 70)
        assert [placed.id for plan in plans for placed in plan.grow] == ["a", "b"]
        grown = next(plan.grow[0] for plan in plans if plan.grow)
        assert len(grown.pages) == 3 and grown.row == 0 and engine.stats.free_pages == 2

    def test_the_youngest_is_offloaded_and_comes_back_before_others(self):
        engine = self.engine()
        plans = [engine.step([*come("a", 64, most=256), *come("b", 64, most=256)]), *steps(engine, 40)]
        plans.append(engine.step(come("c", 10, most=256)))
        while engine.stats.offloaded == 0:
            plans.append(engine.step())
        [placed] = plans[-1].offload
        assert placed.id == "c" and [grown.id for grown in plans[-1].grow] == ["a"]
        drawn = sum(name == "c" for plan in plans for _, name in plan.rows)
        # Those that hold its prompt and what it has drawn; the last token is in none yet.
        assert 64 < 10 + drawn <= 128 and len(placed.pages) == 2
        plans = until_idle(engine, *come("d", 10, most=1))
        restored = next(step for step, plan in enumerate(plans) if any(placed.id == "c" for placed in plan.restore))
        assert restored <= next(step for step, plan in enumerate(plans) if plan.begin)
        assert not any(plan.reads and plan.reads[0].id == "c" for plan in plans)
        assert {name for plan in plans for name in plan.ended} == {"a", "b", "c", "d"}

    def test_one_that_is_offloaded_can_end(self):
        engine = self.engine()
        engine.step([*come("a", 64, most=256), *come("b", 64, most=256), *come("c", 64, most=256)])
        while not (plan := engine.step()).offload:
            pass
        after = engine.step([Ended(plan.offload[0].id)])
        assert after.clear == () and engine.stats.offloaded == 0
        assert not any(placed.id == "c" for plan in until_idle(engine) for placed in plan.restore)

    def test_a_sequence_alone_always_ends(self):
        engine = self.engine()
        plans = until_idle(engine, *come("a", 64, most=448))
        assert engine.stats.preemptions == 0 and plans[-3].ended == ("a",)
        assert [len(plan.grow[0].pages) for plan in plans if plan.grow] == [3, 4, 5, 6, 7, 8]

    def test_offload_idles_the_row(self):
        engine = self.engine()
        engine.step([*come("a", 64, most=256), *come("b", 64, most=256), *come("c", 64, most=256)])
        while not (plan := engine.step()).offload:
            pass
        assert plan.offload == (Placed("c", 2, plan.offload[0].pages),)
        assert plan.clear == () and [row for row, _ in plan.rows] == [0, 1]
