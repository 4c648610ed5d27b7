"""Which tokens of a conversation are learnt."""

import numpy as np
import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.processor.prompt import ChatTemplate
from keye_jax.processor.targets import split_targets
from keye_jax.testing import write_picture, write_processor_files


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    config = KeyeConfig.from_file(presets.TINY)
    write_processor_files(folder, config)
    return Processor.from_checkpoint(folder, config)


def learnt_texts(processor, messages, learn):
    """The text of each run of tokens that are learnt."""
    plan = processor.plan(messages, learn=learn)
    ids, mask = processor.expand(plan).input_ids, processor.targets(plan)
    assert len(ids) == len(mask) == plan.num_tokens
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False]))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [processor.detokenize(ids[a:b], skip_special_tokens=False) for a, b in runs]


def says(role, content, **fields):
    return {"role": role, "content": content, **fields}


class TestTargets:
    def test_only_answers_that_are_to_be_learnt(self, processor):
        messages = [says("system", "Be brief."), says("user", "When?"), says("assistant", "At 3 s.")]
        messages += [says("user", "And then?"), says("assistant", "It ends.")]
        answers = [False, False, True, False, True]
        assert learnt_texts(processor, messages, answers) == ["At 3 s.<|im_end|>", "It ends.<|im_end|>"]
        assert learnt_texts(processor, messages, [*answers[:2], False, False, True]) == ["It ends.<|im_end|>"]

    def test_thoughts_and_tool_calls_belong_to_the_answer(self, processor):
        call = {"type": "function", "function": {"name": "look", "arguments": {"second": 3}}}
        answer = says("assistant", "Yes.", reasoning_content="Hm.", tool_calls=[call])
        [text] = learnt_texts(processor, [says("user", "Well?"), answer], [False, True])
        # The generation prompt opens the thoughts, so they begin behind it.
        assert text.startswith("Hm.\n</think>\n\nYes.\n<tool_call>")
        assert '"second": 3' in text and text.endswith("</tool_call><|im_end|>")

    def test_the_tokens_are_those_that_are_generated_behind_the_prompt(self, processor):
        # A newline at its beginning would otherwise be one token with the template's.
        question, answer = says("user", "Well?"), says("assistant", "\n\nA clock.", reasoning_content="\nHm.")
        plan = processor.plan([question, answer], learn=[False, True])
        prompt = processor.plan([question]).prompt_ids
        assert plan.prompt_ids[: len(prompt)] == prompt
        assert not any(plan.learnt[: len(prompt)]) and plan.learnt[len(prompt)]

    def test_media_before_an_answer(self, processor, tmp_path):
        write_picture(tmp_path / "picture.png", (112, 84))
        question = says("user", [{"type": "image", "image": tmp_path / "picture.png"}, {"type": "text", "text": "?"}])
        assert learnt_texts(processor, [question, says("assistant", "A disc.")], [False, True]) == ["A disc.<|im_end|>"]

    def test_text_that_spells_the_end_of_a_turn_does_not_end_it(self, processor):
        messages = [says("user", "?"), says("assistant", "It reads <|im_end|> here.")]
        assert learnt_texts(processor, messages, [False, True]) == ["It reads <|im_end|> here.<|im_end|>"]


class TestTemplates:
    def split(self, source, opening="<a>\n"):
        template = ChatTemplate(source, {"eos_token": "<e>"})
        rendered = template.render([says("user", "q"), says("assistant", "x")], generation_prompt=False)
        return split_targets(rendered, [False, True], opening, template.end_of_turn)

    def test_what_follows_the_generation_prompt_is_learnt(self):
        source = "<u>\n{{ messages[0].content }}<e>\n<a>\n<t></t>{{ messages[1].content }}<e>\nrest"
        parts = self.split(source)
        assert [("".join(text for text, _ in pieces), learnt) for pieces, learnt in parts] == [
            ("<u>\nq<e>\n<a>\n", False),
            ("<t></t>x<e>", True),
            ("\nrest", False),
        ]

    def test_another_beginning_or_no_end_is_refused(self):
        with pytest.raises(UserError, match=r"does not begin messages\[1\] with '<a>"):
            self.split("{{ messages[0].content }}<b>\n{{ messages[1].content }}<e>")
        with pytest.raises(UserError, match=r"does not end messages\[1\] with '<e>'"):
            self.split("{{ messages[0].content }}<a>\n{{ messages[1].content }}")
