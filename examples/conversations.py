"""Hold ten conversations about the pictures beside this file, and print them as Markdown.

python examples/conversations.py [MODEL] > examples/conversations.md
"""

import sys
from pathlib import Path

import llava_edge

CONVERSATIONS = [
    ("cat.jpg", "What animal is this?", "Is it a cat or a dog?", "How many cats are there?", "Is there a car?"),
    ("cat.jpg", "Describe the picture briefly.", "Can you see a dog?", "What colour is the dog?", "Thank you!"),
    ("coffee.jpg", "What do you see?", "Is there a spoon?", "Is there a cat in the picture?", "What is it good for?"),
    ("coffee.jpg", "Describe this picture in one sentence.", "What colour is the cup?", "How many cups are there?"),
    ("astronaut.jpg", "Describe the picture briefly.", "Is it a man or a woman?", "Is the person outdoors?"),
    ("astronaut.jpg", "Is there a woman in the picture?", "What is the woman doing?", "Do you see a horse?"),
    ("rocket.jpg", "What is shown in this picture?", "Is there a dog?", "Is it day or night?"),
    ("rocket.jpg", "Is this a rocket or a boat?", "How many people are there?", "What do you see?"),
    ("camera.jpg", "What is happening in the picture?", "Is there a man?", "Is there a camera?", "Is there a cat?"),
    ("camera.jpg", "Describe the image.", "What is the man doing?", "How many men are there?", "Is it a dog?"),
]

with llava_edge.load(sys.argv[1] if len(sys.argv) > 1 else "nano") as model:
    for number, (picture, *questions) in enumerate(CONVERSATIONS, 1):
        lines = [f"## {number}. {picture}", "", f"![{picture}]({picture})", ""]
        with model.chat() as chat:
            for turn, question in enumerate(questions):
                images = [] if turn else [Path(__file__).with_name(picture)]
                answer = chat.ask(question, images=images, temperature=0).text
                lines += [f"**{question}**<br>", answer, ""]
        print("\n".join(lines))  # noqa: T201
