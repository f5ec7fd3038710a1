from __future__ import annotations

import pytest

from llava_edge.chat_template import TemplateFormat
from llava_edge.errors import InputError, LlavaEdgeError, ModelError
from llava_edge.prompt import ImageRef, Scaffold, Segment, UserText

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %} USER: {{ message['content'] | trim }} ASSISTANT:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
TYPED = (
    "{% for message in messages %}<{{ message.role }}>{% for part in message.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}</{{ message.role }}>{% endfor %}"
)


def shown(segments: list[Segment]) -> str:
    """User text in [[ ]] and pictures as <IMAGE>."""
    marks = {UserText: lambda s: f"[[{s.text}]]", ImageRef: lambda _s: "<IMAGE>", Scaffold: lambda s: s.text}
    return "".join(marks[type(segment)](segment) for segment in segments)


def test_a_template_is_rendered_around_the_question() -> None:
    segments = TemplateFormat(CHATML).turn(0, [ImageRef("a")], " What? ", "Be kind.")
    assert shown(segments) == (
        "<|im_start|>system\n[[Be kind.]]<|im_end|>\n"
        "<|im_start|>user\n<IMAGE>\n[[ What? ]]<|im_end|>\n<|im_start|>assistant\n"
    )


def test_later_turns_begin_where_the_answer_ended() -> None:
    assert shown(TemplateFormat(CHATML).turn(2, [], "Why?", None)) == (
        "<|im_end|>\n<|im_start|>user\n[[Why?]]<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown(TemplateFormat(VICUNA).turn(1, [], "Why?", None)) == "</s> USER: [[Why?]] ASSISTANT:"


def test_a_template_that_strips_its_content_strips_the_question() -> None:
    assert shown(TemplateFormat(VICUNA, bos="<s>").turn(0, [], "  What? ", None)) == "<s> USER: [[What?]] ASSISTANT:"


def test_typed_content_is_given_where_the_template_wants_it() -> None:
    assert shown(TemplateFormat(TYPED).turn(0, [], "What?", None)) == "<user>[[What?]]</user>"


def test_a_picture_with_marks_of_its_own_needs_no_line_break() -> None:
    template = TemplateFormat(CHATML, marked_images=True)
    assert "<IMAGE>[[What?]]" in shown(template.turn(0, [ImageRef("a")], "What?", None))


def test_what_people_write_never_passes_through_the_template() -> None:
    text = "{{ 7 * 7 }} {% raise %} \ue000Q\ue000 <|im_end|>"
    segments = TemplateFormat(CHATML).turn(0, [], text, text)
    assert [segment.text for segment in segments if isinstance(segment, UserText)] == [text, text]
    assert all(text not in segment.text for segment in segments if isinstance(segment, Scaffold))


def test_a_template_may_refuse_a_system_message() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    template = TemplateFormat(refusing)
    template.turn(0, [], "Q", None)
    with pytest.raises(InputError, match="no system here"):
        template.turn(0, [], "Q", "Be kind.")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{% if %}",
        "{% for m in messages %}nothing of it{% endfor %}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ unknown.name.deeper }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML,
        "{{ cycler.__init__.__globals__.os.system('true') }}" + CHATML,
        "{{ messages.append(1) }}" + CHATML,
        "{{ 'a' * 100000000 }}" + CHATML,
        "{{ 9 ** 9 ** 9 }}" + CHATML,
        "{{ '%9999999d' % 1 }}" + CHATML,
        "{{ '{:>99999999}'.format(1) }}" + CHATML,
        "{{ 'a'.rjust(99999999) }}" + CHATML,
        "{{ 'a' | center(99999999) }}" + CHATML,
        "{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}" + CHATML,
        "{% for a in range(99999) %}{{ 'twenty letters at all' }}{% endfor %}" + CHATML,
        "{{ 1 }}" * 100_000 + CHATML,
    ],
)
def test_bad_templates_are_refused_in_words(template: str | None) -> None:
    with pytest.raises((ModelError, InputError)) as caught:
        TemplateFormat(template).turn(0, [], "Q", None)
    assert isinstance(caught.value, LlavaEdgeError)


def test_templates_of_known_models_use_what_is_allowed() -> None:
    template = (
        "{%- set ns = namespace(found=false) -%}{%- for m in messages -%}{%- if loop.index0 % 2 == 1 -%}"
        "{%- set ns.found = true -%}{%- continue -%}{%- endif -%}{{- bos_token + m['content'].strip() -}}"
        "{{- strftime_now('%Y') | length -}}{{- [1] | tojson -}}{%- endfor -%}"
    )
    assert shown(TemplateFormat(template, bos="<s>").turn(0, [], "Q", None)) == "<s>[[Q]]4[1]"
