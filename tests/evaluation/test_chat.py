"""The chat template of an evaluation: where it is from, and the prompts that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neox.errors import ConfigError, DataError
from neox.evaluation.chat import chat_template_of
from neox.evaluation.tasks import load_tasks
from neox.tokenizer.chat import chat_template_beside, load_chat_template
from tests import small_tokenizer
from tests.evaluation import models

DEMO = Path(__file__).parents[2] / "configs" / "demo_eval"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer.write(tmp_path)
    return configure(tmp_path, TEMPLATE)


def configure(folder: Path, template: str | None) -> Path:
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def settings(**values: Any) -> Any:
    return models.config(**{"apply_chat_template": True} | values)


def test_there_is_none_unless_asked_for(folder):
    assert chat_template_of(settings(apply_chat_template=False, vocab_file=str(folder))) is None


def test_from_its_folder_or_the_vocabulary_s(folder):
    path = str(folder / "tokenizer.json")
    for values in (
        {"chat_template_path": str(folder)},
        {"vocab_file": path},
        {"vocab_file": str(folder)},
        {"vocab_file": "elsewhere", "chat_template_path": str(folder)},
    ):
        template = chat_template_of(settings(**values))
        assert template is not None
        assert (template.folder, template.source) == (str(folder), TEMPLATE)


def test_a_server_takes_what_is_there(folder, tmp_path_factory):
    path = str(folder / "tokenizer.json")
    template = chat_template_beside(models.config(vocab_file=path))
    assert template is not None and template.source == TEMPLATE
    empty = tmp_path_factory.mktemp("empty")
    small_tokenizer.write(empty)
    for values in ({"vocab_file": str(empty / "tokenizer.json")}, {}):
        assert chat_template_beside(models.config(**values)) is None
    configure(empty, None)
    assert chat_template_beside(models.config(vocab_file=str(empty))) is None
    with pytest.raises(ConfigError, match=r"chat_template_path: .* has no chat template"):
        chat_template_beside(models.config(chat_template_path=str(empty)))


WITHOUT = "apply_chat_template is true without chat_template_path, and "
ADVICE = "Set chat_template_path to the folder of a chat model's tokenizer"


def test_none_is_found(tmp_path):
    with pytest.raises(ConfigError) as caught:
        chat_template_of(settings())
    assert str(caught.value) == f"{WITHOUT}there is no vocab_file to look beside. {ADVICE}"

    path = small_tokenizer.write(configure(tmp_path, None))
    with pytest.raises(ConfigError) as caught:
        chat_template_of(settings(vocab_file=str(path)))
    assert str(caught.value).startswith(f"{WITHOUT}{tmp_path} has no chat template: neither")
    assert str(caught.value).endswith(ADVICE)
    with pytest.raises(ConfigError, match=f"^chat_template_path: {tmp_path} has no chat template"):
        chat_template_of(settings(chat_template_path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^chat_template_path: nowhere is no folder;"):
        chat_template_of(settings(chat_template_path="nowhere"))


def test_a_prompt_ends_where_the_model_begins(folder):
    template = load_chat_template(str(folder))
    turns = [{"role": "user", "content": "It was"}, {"role": "assistant", "content": "the best"}]
    assert template.prompt(turns[:1]) == "<user>It was</s><assistant>"
    assert template.prompt(turns, add_generation_prompt=False) == (
        "<user>It was</s><assistant>the best"
    )
    assert template.write(turns, False) == "<user>It was</s><assistant>the best</s>"


def test_a_template_that_refuses_a_task_is_found_before_anything_is_scored(folder):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    data = {"eval_data_dir": str(DEMO), "eval_own_documents": True, "eval_tasks": ["piqa"]}
    configure(folder, strict + TEMPLATE)
    values = data | {"chat_template_path": str(folder)}
    load_tasks(settings(**values))
    with pytest.raises(
        DataError, match=r"piqa: no prompt can be made of its first document .*no system"
    ):
        load_tasks(settings(system_instruction="Answer.", **values))
    with pytest.raises(ConfigError, match="apply_chat_template is true without"):
        load_tasks(settings(**data))
