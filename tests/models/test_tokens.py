"""Texts in groups of similar lengths, against the same texts in one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipdistill.distill.student_texts import StudentTexts
from clipdistill.models.class_embeddings import class_embeddings, class_prompt_tokens
from clipdistill.models.loading import load_student
from clipdistill.models.prompts import PromptSet
from clipdistill.models.tokens import TextTokenizer, TokenGroups
from clipdistill.models.towers import Student

TEXTS = [f"{'word ' * (number * 7 % 9)}text {number}" for number in range(30)]


@pytest.fixture
def tiny(tiny_model: Path) -> Student:
    torch.manual_seed(1)
    return load_student(str(tiny_model))


def with_gradients(student: Student, text_ND: Tensor) -> list[Tensor]:
    student.zero_grad()
    (text_ND * torch.linspace(-1, 1, text_ND.numel()).view_as(text_ND)).sum().backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    return [text_ND, *gradients]


@pytest.mark.parametrize(("group_cost", "groups"), [(0, 4), (20, 3), (30, 2), (1000, 1)])
def test_features_and_gradients_are_those_of_one_group(tiny: Student, group_cost: int, groups: int) -> None:
    tokens = TextTokenizer(tiny.tokenizer, "argmax", group_cost=group_cost).grouped(TEXTS)
    assert len(tokens.tokens) == groups
    widths = [part.shape[1] for part in tokens.tokens]
    assert widths == sorted(widths)
    assert widths[-1] == tiny.tokenize(TEXTS).shape[1]
    found = with_gradients(tiny, tokens.encode(tiny.encode_tokens))
    expected = with_gradients(tiny, tiny.encode_tokens(tiny.tokenize(TEXTS)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().item() + 1e-7, rtol=0)


@pytest.mark.parametrize("group_cost", [0, 30, 200])
def test_the_number_of_groups_has_the_least_cost(tiny: Student, group_cost: int) -> None:
    tokenizer = TextTokenizer(tiny.tokenizer, "argmax", group_cost=group_cost)
    costs = {}
    for groups in (1, 2, 3, 4):
        parts = tokenizer.grouped(TEXTS, at_most=-(-len(TEXTS) // groups)).tokens
        costs[len(parts)] = sum(part.numel() + group_cost for part in parts)
    assert len(tokenizer.grouped(TEXTS).tokens) == min(costs, key=lambda number: costs[number])
    assert [len(part) for part in tokenizer.grouped(TEXTS, at_most=4).tokens] == [4] * 6 + [3] * 2


def test_a_tower_that_sees_all_columns_has_one_group() -> None:
    tokens = TextTokenizer(lambda _: torch.arange(20).view(10, 2), None, group_cost=0).grouped(TEXTS[:10])
    assert torch.equal(tokens.tokens[0], torch.arange(20).view(10, 2))


def test_micro_batches_are_encoded_together(tiny: Student) -> None:
    tokenizer = TextTokenizer(tiny.tokenizer, "argmax", group_cost=0)
    parts = [tokenizer.grouped(texts, at_most=4) for texts in (TEXTS[:10], TEXTS[10:20], TEXTS[20:])]
    calls: list[int] = []

    def encode(tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return tiny.encode_tokens(tokens)

    found = TokenGroups.encode_together(parts, encode)
    assert calls == [12, 9, 9]
    torch.testing.assert_close(found, tiny.encode_tokens(tiny.tokenize(TEXTS)), atol=1e-6, rtol=0)
    parts[1] = tokenizer.grouped(TEXTS[10:20], at_most=10)
    apart = TokenGroups.encode_together(parts, encode)
    assert calls[3:] == [4, 3, 3, 10, 4, 3, 3]
    torch.testing.assert_close(apart, found, atol=1e-6, rtol=0)


def test_rows_can_be_put_in_another_order(tiny: Student) -> None:
    order = [3, 3, 29, 0]
    tokens = tiny.text_tokenizer.grouped(TEXTS).rows(order)
    expected = tiny.encode_tokens(tiny.tokenize([TEXTS[row] for row in order]))
    torch.testing.assert_close(tokens.encode(tiny.encode_tokens), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("templates_per_step", [0, 1, 2])
def test_class_prompts_in_groups_are_the_class_embeddings(tiny: Student, templates_per_step: int) -> None:
    names = tuple(f"{'very ' * (number % 4)}cat {number}" for number in range(500))
    prompts = PromptSet(name="animals", classnames=names, templates=("a {c}", "{c} it", "{c}"))
    tokens_CTL = class_prompt_tokens(tiny, prompts)
    texts = StudentTexts(tiny, class_tokens_CTL=tokens_CTL, templates_per_step=templates_per_step, seed=3)
    inputs = texts.prompt_inputs(7)
    assert len(inputs["prompt_tokens"].tokens) > 1
    found_CD = tiny(**inputs).prompts_CD
    if templates_per_step:
        generator = torch.Generator().manual_seed(3 * 1_000_003 + 7)
        chosen = torch.randperm(prompts.num_templates, generator=generator)[:templates_per_step]
        expected_CD = tiny.encode_prompts(tokens_CTL[:, chosen])
    else:
        expected_CD = class_embeddings(tiny, prompts, batch_size=50)
    torch.testing.assert_close(found_CD, expected_CD, atol=1e-6, rtol=0)


def test_a_tower_that_sees_all_columns_still_gets_its_texts_in_portions() -> None:
    tokens_NL = torch.arange(60).view(20, 3)
    tokens = TextTokenizer(None, None).group(tokens_NL, at_most=6)
    assert [part.shape for part in tokens.tokens] == [(5, 3)] * 4
    assert torch.equal(tokens.encode(lambda each: each), tokens_NL)
