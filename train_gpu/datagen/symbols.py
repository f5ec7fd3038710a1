"""Questions with a definite answer, derived by rule from captions and names.

Only what the symbols say is asked: a noun that several of five captions name is there, one that none of them
names is not. Everything is deterministic for a given random generator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random

Turn = tuple[str, str]
"""A question and its answer."""

SHORT_ANSWER = "Answer the question using a single word or phrase."

BRIEF = (
    "Describe the picture briefly.",
    "Describe this picture in one sentence.",
    "What is shown in this picture?",
    "What do you see?",
    "Write a short caption for this picture.",
    "What is happening in the picture?",
    "Give a brief description of the photo.",
    "Describe the image.",
    "What is in this picture?",
    "Can you tell me what is in the photo?",
    "Summarize the picture in a sentence.",
)
SHORT = tuple(question for question in BRIEF if re.search(r"brief|one sentence|short|Summarize", question))
"""The questions of BRIEF that ask for a sentence that leaves details out."""
NAMING = (
    "What is this?",
    "What is in this picture?",
    "What do you see?",
    "What does the picture show?",
    "Name the main thing in this picture.",
    "Describe the picture briefly.",
    "What is shown in this picture?",
)
ANIMAL = (
    "What animal is in this picture?",
    "What animal is this?",
    "Which animal do you see?",
    "What kind of animal is shown here?",
    "What pet is in the photo?",
)


_PRESENCE = ("Is there {} in the picture?", "Is there {}?", "Do you see {}?", "Can you see {}?")
_ASKS_PRESENCE = tuple(question.partition("{}")[0] for question in _PRESENCE)
COLOUR_WORDS = ("color", "colour")


def word_set(text: str) -> frozenset[str]:
    """The words of a text that white space parts."""
    return frozenset(text.split())


# A noun, and the words in captions that make it (or something so near it that a plain "no" would be wrong) present.
NOUNS: dict[str, frozenset[str]] = {
    "dog": word_set("dog dogs puppy puppies greyhound greyhounds terrier poodle retriever animal animals"),
    "cat": word_set("cat cats kitten kittens animal animals"),
    "horse": word_set("horse horses pony rodeo bronco jockey animal animals"),
    "bird": word_set("bird birds seagull seagulls duck pigeon pigeons"),
    "man": word_set("man men guy guys gentleman person people player players male adult adults"),
    "woman": word_set("woman women lady ladies person people player players female adult adults"),
    "child": word_set("child children kid kids boy boys girl girls baby toddler toddlers person people"),
    "ball": word_set("ball balls basketball football soccer tennis baseball volleyball rugby toy"),
    "bicycle": word_set("bicycle bicycles bike bikes biker bikers cyclist cyclists biking bicyclist"),
    "car": word_set("car cars vehicle vehicles truck suv van racecar"),
    "boat": word_set("boat boats kayak canoe raft ship sailboat kayaker"),
    "skateboard": word_set("skateboard skateboards skateboarder skateboarding skateboarders skater"),
    "hat": word_set("hat hats cap caps helmet helmets hood beanie"),
    "tree": word_set("tree trees forest woods wooded branch branches"),
    "snow": word_set("snow snowy snowboard snowboarder ski skier skiing skis snowboarding ice winter"),
    "beach": word_set("beach sand ocean shore sea sandy waves"),
    "umbrella": word_set("umbrella umbrellas parasol"),
    "airplane": word_set("airplane plane jet"),
    "elephant": word_set("elephant elephants"),
    "pizza": word_set("pizza food"),
}
EXACT: dict[str, frozenset[str]] = {
    "dog": word_set("dog dogs puppy puppies"),
    "cat": word_set("cat cats kitten kittens"),
    "horse": word_set("horse horses"),
    "bird": word_set("bird birds"),
    "man": word_set("man men"),
    "woman": word_set("woman women"),
    "child": word_set("child children kid kids boy boys girl girls toddler baby"),
}
# What of two things a caption can speak of, and what no caption may say then.
_EITHER = (
    ("man", "woman", word_set("woman women lady ladies female girl girls people person couple")),
    ("woman", "man", word_set("man men guy guys gentleman male boy boys people person couple")),
    ("dog", "cat", word_set("cat cats kitten kittens")),
    ("child", "dog", word_set("dog dogs puppy puppies animal")),
)
_OUTDOORS = word_set("""
beach field forest grass grassy hill lake lawn mountain mountains ocean outdoors outside park river road rocks sand
sidewalk sky snow snowy street surf trail tree trees woods yard
""")
_INDOORS = word_set("bedroom carpet couch indoor indoors inside kitchen office restaurant room sofa")
COLOURS = "black white brown red blue green yellow orange pink purple gray grey tan blond blonde"
_COLOUR = re.compile(
    rf"\b({'|'.join(COLOURS.split())})(?: and ({'|'.join(COLOURS.split())}))? "
    r"(dog|shirt|jacket|hat|ball|car|horse|dress|coat|helmet|bike|shorts|cat|uniform|sweater|cap|boat|bird)\b"
)
_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
_PLURALS = {
    "dogs": "dog", "men": "man", "women": "woman", "children": "child", "boys": "boy", "girls": "girl",
    "people": "person", "horses": "horse", "kids": "kid",
}  # fmt: skip
_DOING = re.compile(
    r"^(?:A|An|The) ((?:little |young |old |small |big )?"
    r"(?:man|woman|boy|girl|dog|child|person|baby|toddler|skateboarder|snowboarder|surfer|player))"
    r" (?:is |)(\w+ing\b[^,]*)\.$"
)


_FUNCTION_WORDS = word_set("a an the is are of in on at to with and by from his her their its while as into")


def clean_caption(text: str) -> str | None:
    """A caption as a sentence, or None if it is too short to be one."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([.,;:!?'])", r"\1", text).replace('" ', '"').strip()
    if len(text.split()) < 3:
        return None
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


def by_consensus(sentences: Sequence[str]) -> list[str]:
    """Captions of one picture, those first whose words the others share most (mean cosine of the sets of words)."""
    said = [words(sentence) - _FUNCTION_WORDS for sentence in sentences]

    def shared(index: int) -> float:
        others = [s for i, s in enumerate(said) if i != index]
        return sum(len(said[index] & s) / ((len(said[index]) * len(s)) ** 0.5 or 1) for s in others)

    return [sentences[index] for index in sorted(range(len(said)), key=shared, reverse=True)]


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    vowel = re.match(r"(?!uni|eu|ute|one\b)[aeiou]|hour|honest", noun.lower())
    return f"{'an' if vowel else 'a'} {noun}"


def words(text: str) -> set[str]:
    """The lower-cased words of a text."""
    return set(re.findall(r"[a-z]+", text.lower()))


def _one(noun: str) -> str:
    """The noun with its article, if it can be counted."""
    return noun if noun == "snow" else article(noun)


def asks_presence(question: str) -> bool:
    """Whether a question is one of :func:`presence`."""
    return question.startswith(_ASKS_PRESENCE)


def cannot_see(noun: str) -> str:
    """The answer to a question about what is not in the picture."""
    return f"I can't see {_one(noun)} in the picture."


def presence(noun: str, present: bool, rng: Random, short: float = 0.3) -> Turn:
    """A yes/no question on a thing; ``short`` is how often it asks for a single word."""
    thing = _one(noun)
    question = rng.choice(_PRESENCE).format(thing)
    if rng.random() < short:
        return f"{question}\n{SHORT_ANSWER}", "Yes" if present else "No"
    return question, f"Yes, there is {thing} in the picture." if present else f"No, there is no {noun} in the picture."


def caption_facts(sentences: Sequence[str], rng: Random) -> list[Turn]:
    """Questions about a picture on what its captions agree on, and one that takes for granted what they lack."""
    seen = [words(s) for s in sentences]
    there = [n for n, w in EXACT.items() if sum(bool(s & w) for s in seen) >= 2]
    absent = [n for n, w in NOUNS.items() if not any(s & w for s in seen)]
    turns = [presence(n, True, rng) for n in there]
    turns += [presence(n, False, rng) for n in rng.sample(absent, min(len(absent), max(1, len(there))))]
    if "dog" in there and sum(bool(s & EXACT["dog"]) for s in seen) >= 3:
        several = any("dogs" in s or "puppies" in s for s in seen)
        turns.append((rng.choice(ANIMAL), "There are dogs in the picture." if several else "It is a dog."))
    turns += _colours(sentences, rng) + _counts(sentences, rng)
    turns += [
        which_of(one, other, rng) for one, other, never in _EITHER if one in there and not any(never & s for s in seen)
    ]
    turns += _indoors(seen, rng)
    if rng.random() < 0.5:
        turns.append(unseen(rng.choice(absent), rng))
    for sentence in sentences:
        if match := _DOING.match(sentence):
            turns.append((f"What is the {match[1]} doing?", f"The {match[1]} is {match[2]}."))
    return turns


def _colours(sentences: Iterable[str], rng: Random) -> list[Turn]:
    found: dict[str, set[str]] = {}
    for sentence in sentences:
        for first, second, noun in _COLOUR.findall(sentence.lower()):
            found.setdefault(noun, set()).add(f"{first} and {second}" if second else first)
    turns = []
    for noun, colours in sorted(found.items()):
        if len(colours) == 1:
            verb = "are" if noun == "shorts" else "is"
            word = rng.choice(COLOUR_WORDS)
            turns.append((f"What {word} {verb} the {noun}?", f"The {noun} {verb} {colours.copy().pop()}."))
    return turns


def _counts(sentences: Sequence[str], rng: Random) -> list[Turn]:
    turns = []
    for plural, singular in _PLURALS.items():
        numbers = {m for s in sentences for m in re.findall(rf"\b({'|'.join(_COUNTS)}) (?:\w+ )?{plural}\b", s.lower())}
        if len(numbers) == 1:
            turns.append((f"How many {plural} are there?", f"There are {numbers.pop()} {plural}."))
        elif (
            not numbers
            and sum(bool(re.search(rf"\b(?:a|one) (?:\w+ )?{singular}\b", s.lower())) for s in sentences) >= 4
        ):
            turns.append((f"How many {plural} are there?", f"There is one {singular}."))
    return rng.sample(turns, min(2, len(turns)))


def _indoors(seen: Sequence[set[str]], rng: Random) -> list[Turn]:
    """Whether it is indoors, if two captions speak of what is found there and none of what is found elsewhere."""
    inside, outside = (sum(bool(place & s) for s in seen) for place in (_INDOORS, _OUTDOORS))
    if min(inside, outside) > 0 or max(inside, outside) < 2:
        return []
    is_inside = inside > 0
    where = "indoors" if is_inside else "outdoors"
    asked = rng.choice(("Is this indoors or outdoors?", "Is it outdoors or indoors?", "outdoors", "indoors"))
    if asked.endswith("?"):
        return [(asked, f"It is {where}.")]
    return [(f"Is this {asked}?", f"{'Yes' if asked == where else 'No'}, it is {where}.")]


def unseen(noun: str, rng: Random) -> Turn:
    """A question that takes for granted what is not in the picture."""
    colour = rng.choice(COLOUR_WORDS)
    question = rng.choice(
        (f"What {colour} is the {noun}?", f"Where is the {noun}?", f"What does the {noun} look like?")
    )
    return question, cannot_see(noun)


def which_of(noun: str, other: str, rng: Random) -> Turn:
    """A question that offers what is in the picture and something else."""
    first, second = rng.sample((article(noun), article(other)), 2)
    it = rng.choice(("it", "this"))
    return f"Is {it} {first} or {second}?", f"It is {article(noun)}."


def name_turns(noun: str, kind: str | None, others: Sequence[str], rng: Random) -> list[Turn]:
    """Questions about a picture of which only the name of the main thing is known.

    ``kind`` is "animal" or a kind of animal such as "dog", or None for things; ``others`` are names of what is
    certainly not in the picture.
    """
    a_noun = article(noun)
    answer = rng.choice((f"This is {a_noun}.", f"It is {a_noun}.", f"The picture shows {a_noun}."))
    turns = [(rng.choice(NAMING), answer)]
    turns.append((f"{rng.choice(NAMING[:2])}\n{SHORT_ANSWER}", noun))
    if kind is not None:
        longer = f"It is {a_noun}." if kind in ("animal", noun) else f"It is {article(kind)}, more exactly {a_noun}."
        turns.append((rng.choice(ANIMAL), longer))
        turns.append((f"{rng.choice(ANIMAL)}\n{SHORT_ANSWER}", noun if kind == "animal" else kind))
    turns.append(presence(noun, True, rng))
    missing = [rng.choice([o for o in others if o != noun]) for _ in range(3)]
    turns.append(presence(missing[0], False, rng))
    turns.append(which_of(noun, missing[1], rng))
    if rng.random() < 0.3:
        turns.append(unseen(missing[2], rng))
    return turns


def pet_turns(noun: str, rng: Random) -> list[Turn]:
    """Questions about a photo of a cat or a dog."""
    other = "dog" if noun == "cat" else "cat"
    pair = rng.choice(("a cat or a dog", "a dog or a cat"))
    return [
        (rng.choice(ANIMAL), rng.choice((f"It is a {noun}.", f"This is a {noun}.", f"The animal is a {noun}."))),
        (rng.choice(NAMING), rng.choice((f"A {noun}.", f"This is a {noun}.", f"The picture shows a {noun}."))),
        (rng.choice((f"Is this {pair}?", f"Is it {pair}?", f"Is the animal {pair}?")), f"It is a {noun}."),
        (f"{rng.choice(ANIMAL)}\n{SHORT_ANSWER}", noun),
        presence(noun, True, rng),
        presence(other, False, rng),
        unseen(other, rng),
    ]
