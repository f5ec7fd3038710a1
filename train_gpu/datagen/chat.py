"""Talks without a picture, answered by a language model as it is.

Mixed into a training in a small share they keep what the model said before: a rehearsal (Robins, Connection Science 7,
1995) on its own answers, which need not be right to serve. The prompts are our own.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from llava_edge.errors import InputError
from llava_edge.train_gpu.datagen.check import Rejected, Turns
from llava_edge.train_gpu.datagen.generate import Progress, Say, Statistics, ask_all, conversation
from llava_edge.train_gpu.datagen.llm import Llm
from llava_edge.train_gpu.datagen.tasks import Message


def _listed(text: str, mark: str = ",") -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(mark))


# What stands for {NAME} in a prompt.
_WORDS = {
    "thing": _listed("""a volcano, a bridge, a compass, a library, a battery, a desert, a rainbow, a robot, a glacier,
        a lighthouse, a telescope, a magnet, a clock, a garden, a market, a river, a shadow, a violin, an earthquake,
        an engine, an island, an orchestra, a vaccine, a planet, a mirror, a bicycle, a thermometer, a cloud"""),
    "idea": _listed("""gravity, friendship, electricity, democracy, patience, photosynthesis, money, music, honesty,
        evolution, courage, energy, time, language, luck, justice, sleep, memory, weather, recycling, trade"""),
    "animal": _listed("""elephant, bee, whale, owl, penguin, spider, horse, frog, bat, turtle, dog, cat, camel, ant,
        eagle, octopus, rabbit, wolf, dolphin, snake, squirrel"""),
    "place": _listed("""France, Japan, Egypt, Brazil, India, Canada, Italy, Kenya, Australia, Mexico, China, Spain,
        Norway, Greece, Peru, Turkey, Germany, Morocco, Thailand, Poland"""),
    "task": _listed("""boil an egg, plant a tree, write a letter, learn a new language, clean a window, make tea,
        save money, remember names, fall asleep, bake bread, fix a flat tyre, tie a shoelace, pack a suitcase,
        study for an exam, cook rice, wash a sweater, read more books, grow tomatoes, look after a cat, save water"""),
    "group": _listed("""fruits, vegetables, sports, musical instruments, colours, countries in Africa, planets, jobs,
        tools, farm animals, birds, drinks, languages, school subjects, board games, flowers, hobbies"""),
    "few": _listed("three, four, five"),
    "topic": _listed("""the rain, a lost key, the sea, a brave mouse, the moon, an old tree, the first day of school,
        a train at night, winter, a kind giant, a garden in spring, two friends, a quiet village, a dragon, a bakery,
        the wind, a star that fell, a small boat, grandmother's kitchen, a robot who could sing, a long journey"""),
    "sentence": _listed("""The cat sleeps on the chair. | I go to the market with my sister. | Give me the book. |
        We don't have enough time. | The meeting starts at nine. | The soup is too hot. | It was a very good film. |
        He forgot his umbrella at home. | They are building a new house. | She likes to walk in the forest. |
        My brother plays the guitar every evening. | The train was late because of the snow. | This exercise is hard. |
        You have to do your homework now. | The children laughed at the clown. | Send me the report today. |
        The shop sells bread, milk and cheese. | I can't come to the party.""", "|"),
    "word": _listed("""happy, fast, cold, big, old, quiet, easy, bright, strong, early, rich, clean, brave, soft,
        empty, deep, angry, simple, polite, dry, heavy, sharp, begin, buy, laugh, help, build, show, answer, win"""),
    "pair": _listed("""tea or coffee, a city or a village, summer or winter, the mountains or the beach, rain or snow,
        a dog or a cat, reading or watching films, breakfast or dinner, morning or evening, walking or cycling"""),
    "habit": _listed("""early rising, learning to cook, keeping a diary, school uniforms, travelling alone, homework,
        working from home, eating less sugar, living in the city, zoos, video games, public transport, small talk"""),
    "puzzle": _listed("""the sky is blue, birds can fly, we need sleep, it gets dark at night, ice floats, dogs bark,
        leaves fall in autumn, the sea is salty, we have to share, plants need light, people pay taxes, bread rises,
        the moon changes its shape, we brush our teeth, planes stay in the air, we have seasons, metal rusts"""),
    "one": tuple(map(str, range(3, 13))),
    "two": tuple(map(str, range(2, 10))),
}  # fmt: skip
_ON = (
    "Can you say that in one sentence?", "Can you say that in simpler words?", "Can you tell me more about that?",
    "Why is that important?", "Can you give me an example?", "What is the most important part of that?",
)  # fmt: skip
# Prompts, and the questions that may follow on them.
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("What is {thing}?", "What is {thing} used for?", "How does {thing} come about?", "Describe {thing}."), _ON),
    (("What is {idea}?", "Define {idea} in one sentence.", "What does the word {idea} mean?"), _ON),
    (("Tell me a fact about the {animal}.", "What does a wild {animal} eat?", "Where does the {animal} live?"), _ON),
    (("What is the capital of {place}?", "What is {place} known for?", "What language is spoken in {place}?"), _ON),
    (("How do I {task}?", "Give me three tips to {task}.", "What do I need to {task}?"), (*_ON, "What comes first?")),
    (("Name {few} {group}.", "Give me a list of {few} {group}.", "Can you list {few} {group}?"),
     ("Which of them do you like best?", "Can you add one more?", "Can you tell me more about the first one?")),
    (("Write a short story about {topic}.", "Write a short poem about {topic}.", "Tell me two lines about {topic}."),
     ("What happens next?", "Can you give it a title?", "Can you make it shorter?")),
    (("Rewrite this sentence in other words: {sentence}", "Make this sentence more polite: {sentence}",
      "Make this sentence longer: {sentence}", "Write this sentence in the past tense: {sentence}",
      "Turn this sentence into a question: {sentence}"), ("Can you do it once more, in another way?",)),
    (("What is a synonym of {word}?", "What is the opposite of {word}?", "Use the word {word} in a sentence.",
      'What does "{word}" mean?'), ("Can you use it in a sentence?", "Do you know another one?")),
    (("Which is better, {pair}?", "What do you think about {habit}?", "What is good about {habit}?",
      "Is there anything bad about {habit}?", "Why do people like {habit}?"), _ON),
    (("Explain to a child why {puzzle}.", "Why is it that {puzzle}?", "Explain {idea} to a child."), _ON),
    (("What is {one} plus {two}?", "How much is {one} times {two}?", "What is {one} minus 2?",
      "I have {one} apples and buy {two} more. How many do I have?"), ()),
    (("Hello!", "Hi there.", "Good morning!", "Good evening.", "How are you?", "Hello, how are you today?",
      "Thank you very much!", "Thanks for your help.", "Goodbye!", "Good night.", "See you tomorrow.", "I am tired.",
      "I am bored. What can I do?", "I had a bad day.", "I had a great day!", "Can you help me?", "Tell me a joke.",
      "What can you do?", "Nice to meet you.", "It is my birthday today!", "Can we talk?", "Say something nice."), ()),
)  # fmt: skip
_FOLLOWED = 0.11  # the share of talks with a second question, where a kind has some

# The end of a sentence; the point behind a list's number is none.
_END = re.compile(r"(?<!^\d)(?<!^\d\d)[.!?][\"')*]*(?=\s|$)", re.MULTILINE)
_SELF = re.compile(
    r"(?i)\b(images?|pictures?|photo(graph)?s?|(un|not )able to see|can(no|')t see|an AI|language model)\b"
)
_RUN = 8  # so many words that come again are a repetition


@dataclass(frozen=True)
class Talk:
    """A question without a picture, and perhaps one that follows on its answer."""

    name: str
    questions: tuple[str, ...]

    def most_tokens(self, max_tokens: int) -> int:
        """What it costs at most; each question reads what was said before."""
        return len(self.questions) * (sum(map(len, self.questions)) // 3 + len(self.questions) * max_tokens)

    def ask(self, say: Say) -> Turns:
        """The turns up to the first answer that can't be used; Rejected if it is the first of all."""
        messages: list[Message] = []
        turns: Turns = []
        for question in self.questions:
            messages.append(("user", question))
            completion = say(messages)
            try:
                answer = usable(completion.text, cut_off=completion.cut_off)
            except Rejected:
                if turns:
                    break
                raise
            messages.append(("assistant", answer))
            turns.append((question, answer))
        return turns

    def sample(self, turns: Turns) -> dict[str, Any]:
        """LLaVA JSON without a picture."""
        return {"id": self.name, "conversations": conversation(turns)}


def talks(count: int, seed: int) -> list[Talk]:
    """So many talks with different first questions, of all kinds in turn; fewer are the first of more."""
    rng = Random(seed)
    kinds = []
    for templates, follow_ups in _KINDS:
        prompts = [prompt for template in templates for prompt in _filled(template)]
        kinds.append([(prompt, follow_ups) for prompt in rng.sample(prompts, len(prompts))])
    ordered = [one for layer in itertools.zip_longest(*kinds) for one in layer if one is not None]
    if count > len(ordered):
        raise InputError(f"--count {count} is more than the {len(ordered)} prompts that there are")
    made = []
    for number, (prompt, follow_ups) in enumerate(ordered[:count]):
        more = (rng.choice(follow_ups),) if follow_ups and rng.random() < _FOLLOWED else ()
        made.append(Talk(f"chat#{number}", (prompt, *more)))
    return made


def _filled(template: str) -> Iterator[str]:
    slots = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    for words in itertools.product(*(_WORDS[slot] for slot in slots)):
        yield template.format(**dict(zip(slots, words, strict=True)))


def usable(text: str, *, cut_off: bool) -> str:
    """An answer that can be trained on, up to its last full sentence if it was cut off; else :class:`Rejected`."""
    text = text.strip()
    if cut_off:
        ends = [match.end() for match in _END.finditer(text)]
        if not ends or 2 * ends[-1] < len(text):
            raise Rejected("cut off at the limit of tokens")
        text = text[: ends[-1]]
    if not text:
        raise Rejected("empty")
    if _SELF.search(text):
        raise Rejected("speaks of pictures or of itself")
    words = re.findall(r"\w+", text.lower())
    runs = [tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)]
    lines = (re.sub(r"^\W*(\d+\W+)?|\W+$", "", line) for line in _END.sub("\n", text.lower()).splitlines())
    if any(len(set(said)) < len(said) for said in (runs, list(filter(None, lines)))):
        raise Rejected("repeats itself")
    return text


def chat(
    count: int,
    llm: Llm,
    output: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Statistics:
    """Ask so many talks and write ``output`` and its rejects; ``options`` are those of :func:`generate.ask_all`.

    ``settings`` is what a resumed run must have in common with the stopped one, besides the questions.
    """
    asked = talks(count, seed)
    shared = {"talks": [one.questions for one in asked], **(settings or {})}
    return ask_all(asked, llm, output, Progress(output, shared, resume=resume, key="id"), **options)
