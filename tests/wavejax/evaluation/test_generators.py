"""RULER's samples and the others: their wording, their sizes, their answers, their seeds."""

import json
import random
import re
from collections import Counter

import pytest

from models.checkpoints.open import find_default_model
from models.errors import InputError
from models.text.tokenizer import load_tokenizer
from wavejax.evaluation.haystack import load_haystack
from wavejax.evaluation.niah import NOISE, NeedleTask
from wavejax.evaluation.samples import Material, largest, score
from wavejax.evaluation.tasks import RULER, TASKS, parse_tasks
from wavejax.evaluation.variable_tracking import VariableTracking
from wavejax.evaluation.word_counting import CommonWords, FrequentWords

DRAFTED = [name for name in TASKS if name not in ("drift", "perplexity")]


@pytest.fixture(scope="module")
def material():
    return Material(load_tokenizer(find_default_model()), load_haystack())


def draft(task, amount, length, material, seed=0):
    """The question's message, how its answer begins, the references, and the draft."""
    made = task.draft(amount, length, random.Random(seed), material)
    return made.turns[-1].message, made.turns[-1].answer, made.references, made


@pytest.mark.parametrize("length", [1200, 4096])
@pytest.mark.parametrize("name", DRAFTED)
def test_samples_fill_the_budget_and_never_exceed_it(material, name, length):
    task = TASKS[name]
    for index in range(4):
        sample = task.sample(material, length, 42, index)
        total = len(sample.tokens) + sample.new_tokens
        # One step short is 500 words of prose at most.
        assert 0.75 * length <= total <= length
        assert sample.new_tokens == task.new_tokens


@pytest.mark.parametrize("name", DRAFTED)
def test_answers_are_in_the_text_and_seeds_repeat(material, name):
    task = TASKS[name]
    sample = task.sample(material, 1200, 7, 3)
    text = material.tokenizer.decode(sample.tokens)
    assert sample.references
    assert all(reference in text for reference in sample.references)
    # A copy of the material: nothing is remembered but what the seed gives.
    again = Material(material.tokenizer, material.haystack)
    assert task.sample(again, 1200, 7, 3) == sample
    assert task.sample(material, 1200, 7, 4) != sample
    assert task.sample(material, 1200, 8, 3) != sample


def test_tokens_to_generate_are_rulers():
    found = {name: task.new_tokens for name, task in RULER.items()}
    needles = {name: 128 for name in found if name.startswith("niah")}
    assert len(needles) == 8
    assert found == needles | {"vt": 30, "cwe": 120, "fwe": 50}


def test_one_needle_in_noise(material):
    message, prefix, (value,), _ = draft(NeedleTask("noise"), 3, 4096, material)
    key = re.search(r"magic number for (\S+) mentioned", message)[1]
    assert re.fullmatch(r"[\w-]+-[\w-]+", key)
    assert re.fullmatch(r"\d{7}", value)
    first, *lines, last = message.split("\n")
    assert first == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards."
    )
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert sorted(lines) == sorted([NOISE] * 3 + [needle])
    assert last == f"What is the special magic number for {key} mentioned in the provided text?"
    assert prefix == f" The special magic number for {key} mentioned in the provided text is"


def test_four_queries_in_prose(material):
    task = TASKS["niah_multiquery"]
    message, prefix, values, _ = draft(task, 200, 4096, material)
    start = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\n"
    )
    assert message.startswith(start)
    query = re.search(r"\nWhat are all the special magic numbers for (.*) mentioned in", message)[1]
    assert prefix == f" The special magic numbers for {query} mentioned in the provided text are"
    keys = query.replace(", and ", ", ").split(", ")
    assert query == f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    for key, value in zip(keys, values, strict=True):
        assert f"One of the special magic numbers for {key} is: {value}." in message
    # Without its needles the text is the haystack's beginning.
    context = message[len(start) : message.index("\nWhat are")]
    prose = re.sub(r" ?One of the special magic numbers for \S+ is: \d{7}\. ?", " ", context)
    assert prose.split() == list(material.haystack.words[:200])


@pytest.mark.parametrize(
    "name, needles, kinds",
    [
        ("niah_single_3", 1, "uuids"),
        ("niah_multikey_1", 4, "numbers"),
        ("niah_multikey_2", 31, "numbers"),
        ("niah_multikey_3", 31, "uuids"),
        ("niah_multivalue", 4, "numbers"),
        ("many_needles", 16, "numbers"),
    ],
)
def test_how_many_needles(material, name, needles, kinds):
    message, _, references, _ = draft(TASKS[name], 30, 4096, material)
    found = re.findall(rf"One of the special magic {kinds} for (\S+) is: (\S+)\.", message)
    assert len(found) == needles
    query = re.search(r"\nWhat .* for (\S+) mentioned", message)[1]
    assert tuple(sorted(value for key, value in found if key == query)) == tuple(sorted(references))


def test_variables_lead_back_to_the_value(material):
    message, prefix, names, _ = draft(VariableTracking(), 20, 4096, material)
    beginning = "Memorize and track the chain(s) of variable assignment hidden in the following"
    assert message.count(beginning) == 2
    example, question = message.rsplit("\n\n" + beginning, 1)
    assert len(material.tokenizer.encode(example, add_special=False)) <= 500
    for text, letters in ((example, 3), (question, 5)):
        found = re.findall(rf"VAR ([A-Z]{{{letters}}}) = (?:VAR )?(\w+)", text)
        value = re.search(r"assigned the value (\d{5}) in the text above\.", text)[1]
        variables = dict(found)
        assert len(found) == len(variables) == 5
        for name in variables:
            while name in variables:
                name = variables[name]
            assert name == value
    assert names == tuple(name for name, _ in found)
    assert prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are: "
    )
    # The example is answered.
    solved = [name for name, _ in re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)", example)]
    assert example.endswith("they are:  " + " ".join(solved))


@pytest.mark.parametrize(
    "length, common, rare, example_common, example_rare", [(4096, 30, 3, 10, 3), (2048, 6, 1, 3, 1)]
)
def test_common_words_are_counted(material, length, common, rare, example_common, example_rare):
    _, _, references, made = draft(CommonWords(), 25, length, material)
    example, question = made.turns
    for turn, often, seldom, size in (
        (example, example_common, example_rare, 40 if length >= 4096 else 20),
        (question, common, rare, 25),
    ):
        listed = turn.message.split("\n")[1]
        numbered = re.findall(r"(\d+)\. (.*?)(?= \d+\. |$)", listed)
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered)
        assert len(counts) == size
        top = {word for word, count in counts.items() if count == often}
        assert len(top) == 10
        assert {counts[word] for word in counts.keys() - top} == {seldom}
    assert top == set(references)
    solved = re.findall(r"\d+\. (.*?)(?= \d+\. |\n)", example.answer)
    assert len(solved) == 10
    assert all(f" {word}" in example.message for word in solved)
    start = " Answer: The top 10 words that appear most often in the list are:"
    assert example.answer.startswith(start + " 1. ")
    assert question.answer == start


def test_coded_words_follow_the_zeta_distribution(material):
    message, prefix, references, _ = draft(FrequentWords(), 900, 2048, material)
    body = re.fullmatch(
        r"Read the following coded text and track the frequency of each coded word\. Find the three"
        r" most frequently appeared coded words\. (.*)\nQuestion: Do not provide any explanation\. "
        r"Please ignore the dots '\.\.\.\.'\. What are the three most frequently appeared words in "
        r"the above coded text\?",
        message,
    )[1]
    ranked = Counter(body.split()).most_common()
    assert [word for word, _ in ranked[:4]] == ["...", *references]
    # 1 / zeta(2) is 0.6079.
    assert [count for _, count in ranked[:4]] == [547, 136, 60, 34]
    assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])
    assert prefix.endswith("the three most frequently appeared words are:")


def test_key_value_pairs_are_json(material):
    message, prefix, (value,), _ = draft(TASKS["key_value"], 12, 4096, material)
    pairs = json.loads(message[message.index("{") : message.index("}") + 1])
    key = re.search(r'of the key "(.*?)"', message)[1]
    assert len(pairs) == 12
    assert pairs[key] == value
    assert f'"{key}"' in prefix


def test_prose_goes_on(material):
    sample = TASKS["perplexity"].sample(material, 1024, 42, 0)
    assert len(sample.tokens) + len(sample.continuation) == 1024
    assert len(sample.continuation) == sample.new_tokens == 512
    text = material.tokenizer.decode([*sample.tokens, *sample.continuation])
    # The last word may be cut.
    assert " ".join(text.split()[:-1]) in " ".join(material.haystack.words)
    drift = TASKS["drift"].sample(material, 4096, 42, 0)
    assert (len(drift.tokens), drift.new_tokens, drift.continuation) == (2048, 2048, ())
    assert TASKS["drift"].sampled


def test_chat_templates_enclose_the_message_alone(material):
    sample = TASKS["niah_single_2"].sample(material, 1200, 42, 0)
    text = material.tokenizer.backend.decode(list(sample.tokens), skip_special_tokens=False)
    assert text.count("<|im_start|>user\n") == 1
    end = text.index("<|im_start|>assistant\n")
    assert text[end:].startswith("<|im_start|>assistant\n The special magic number for ")
    assert text.endswith(" mentioned in the provided text is")


@pytest.mark.parametrize(
    "answer, expected",
    [("it is ABC and 123", 1.0), ("abc", 0.5), ("1 2 3", 0.0), ("xabcx, 0123", 1.0), ("", 0.0)],
)
def test_score_is_the_share_of_references_found(answer, expected):
    assert score(("abc", "123"), answer) == expected


def test_largest_amount():
    assert largest(lambda n: 10 * n, 99, 1, 1000) == 9
    assert largest(lambda n: 10 * n, 100, 3, 1000) == 10
    assert largest(lambda n: 10 * n, 5, 3, 1000) == 3  # none fits
    assert largest(lambda n: 10 * n, 10**6, 3, 1000) == 1000


def test_what_cannot_be_made_is_said(material):
    with pytest.raises(InputError, match=r"no sample of 200 tokens, 128 of them generated"):
        TASKS["niah_single_1"].sample(material, 200, 42, 0)
    with pytest.raises(InputError, match="name more text by `haystack`"):
        TASKS["perplexity"].sample(material, 10**6, 42, 0)
    with pytest.raises(InputError, match="have no room"):
        TASKS["drift"].sample(material, 2048, 42, 0)
    with pytest.raises(InputError, match="has not the words"):
        CommonWords().sample(material, 10**6, 42, 0)


def test_tasks_by_name():
    assert list(parse_tasks("vt, ruler")) == ["vt", *(name for name in RULER if name != "vt")]
    assert list(parse_tasks("drift")) == ["drift"]
    with pytest.raises(InputError, match="no task 'qa_1'; there are: ruler, niah_single_1"):
        parse_tasks("vt,qa_1")
    with pytest.raises(InputError, match="no task in ','"):
        parse_tasks(",")


def test_haystacks_from_files(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One two.\n\nThree  four", encoding="utf-8")
    haystack = load_haystack([str(file), str(file)])
    assert haystack.words == ("One", "two.", "Three", "four") * 2
    assert haystack.take(9).split() == [*haystack.words, "One"]
    assert haystack.name == "text.txt, text.txt"
    with pytest.raises(InputError, match="absent: No such file"):
        load_haystack([str(tmp_path / "absent")])
    file.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        load_haystack([str(file)])
    file.write_bytes(b" \n")
    with pytest.raises(InputError, match="has no text"):
        load_haystack([str(file)])
