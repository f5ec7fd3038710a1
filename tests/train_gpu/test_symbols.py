"""Questions derived from captions and names are answerable and true."""

from __future__ import annotations

import re
from random import Random

from llava_edge.train_gpu.datagen.nano import held_out
from llava_edge.train_gpu.datagen.symbols import (
    article,
    by_consensus,
    caption_facts,
    clean_caption,
    name_turns,
    pet_turns,
    words,
)

CAPTIONS = [
    "A black dog is running in the snow.",
    "The black dog runs through snow.",
    "A dog is playing in the snow.",
    "A black dog in the snow.",
    "One dog runs.",
]


def facts(captions: list[str], seed: int = 0) -> dict[str, str]:
    return dict(caption_facts(captions, Random(seed)))


def test_captions_become_sentences() -> None:
    assert clean_caption("two dogs  play , in snow") == "Two dogs play, in snow."
    assert clean_caption("A man .") is None


def test_the_caption_that_says_what_the_others_say_comes_first() -> None:
    captions = [
        "Something wonderful happens outside.",
        "A brown dog runs through deep snow.",
        "A dog runs in snow.",
        "The dog, which wears a red collar, and its friend are somewhere cold.",
    ]
    ordered = by_consensus(captions)
    assert ordered[:2] == ["A dog runs in snow.", "A brown dog runs through deep snow."]
    assert sorted(ordered) == sorted(captions)
    assert by_consensus([]) == []


def test_what_the_captions_agree_on_is_asked() -> None:
    found = facts(CAPTIONS)
    colour = [answer for question, answer in found.items() if re.match(r"What colou?r is the dog", question)]
    assert colour == ["The dog is black."]
    assert found["What is the dog doing?"] in ("The dog is running in the snow.", "The dog is playing in the snow.")
    assert found["How many dogs are there?"] == "There is one dog."


def test_captions_that_disagree_give_no_question() -> None:
    found = facts(["A black dog runs along.", "A white dog runs along.", "Two dogs run.", "Three dogs run off."])
    assert not any(question.startswith(("What colo", "How many")) for question in found)


def test_no_thing_is_denied_that_a_caption_names() -> None:
    for seed in range(50):
        for question, answer in facts(CAPTIONS, seed).items():
            if answer.startswith("No"):
                assert not {"dog", "snow"} & words(question)


def test_what_no_caption_names_can_not_be_seen() -> None:
    unseen = [
        q for seed in range(50) for q, answer in facts(CAPTIONS, seed).items() if answer.startswith("I can't see")
    ]
    assert unseen
    assert not any({"dog", "snow"} & words(question) for question in unseen)


def test_of_two_things_the_one_that_captions_name_is_right() -> None:
    captions = ["A man is on a beach.", "A man in sand.", "The old man stands outside."]
    found = [pair for seed in range(20) for pair in facts(captions, seed).items()]
    offered = {answer for question, answer in found if {"man", "woman"} <= words(question)}
    assert offered == {"It is a man."}
    where = {(q, answer) for q, answer in found if "doors" in q}
    assert {answer for _, answer in where} == {"It is outdoors.", "Yes, it is outdoors.", "No, it is outdoors."}
    assert all(("indoors" in q) == answer.startswith("No") for q, answer in where if " or " not in q)


def test_where_captions_disagree_on_the_place_it_is_not_asked() -> None:
    captions = ["A man on a sofa.", "A man in the kitchen.", "A man in the park."]
    assert not any("doors" in question for seed in range(20) for question in facts(captions, seed))


def test_people_of_both_kinds_are_not_offered() -> None:
    captions = ["A man and a woman walk.", "A man with a girl.", "A man and his wife."]
    assert not any({"man", "woman"} <= words(question) for seed in range(20) for question in facts(captions, seed))


def test_presence_is_balanced_for_names() -> None:
    for seed in range(20):
        turns = name_turns("otter", "animal", ["piano", "sofa"], Random(seed))
        answers = [answer.lower().split()[0].strip(",") for _, answer in turns]
        assert (answers.count("yes"), answers.count("no")) == (1, 1)


def test_kinds_are_named() -> None:
    turns = dict(name_turns("beagle", "dog", ["piano", "beagle"], Random(1)))
    assert "It is a dog, more exactly a beagle." in turns.values()


def test_pets_are_never_both() -> None:
    for _, answer in pet_turns("cat", Random(3)):
        assert "dog" not in answer or answer.startswith(("No", "I can't see"))


def test_articles() -> None:
    assert (article("otter"), article("cat")) == ("an otter", "a cat")


def test_held_out_pictures_do_not_depend_on_the_listing() -> None:
    names = [f"cat.{i}.jpg" for i in range(50)]
    assert held_out(names, 5) == held_out(names[::-1], 5)
    assert len(held_out(names, 5)) == 5
