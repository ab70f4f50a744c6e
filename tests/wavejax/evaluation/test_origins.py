"""All that changes a sample or an answer is in an evaluation's settings, and is named."""

import dataclasses
import hashlib
import json

import pytest

from models.checkpoints.open import open_checkpoint
from models.text.tokenizer import load_tokenizer
from tests.support.tiny_models import make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, TINY, write_tokenizer
from wavejax.evaluation import niah, origins, word_counting, words
from wavejax.evaluation.haystack import Haystack, load_haystack
from wavejax.evaluation.origins import parts_of, settings_of
from wavejax.evaluation.samples import GENERATOR, Material
from wavejax.evaluation.setup import Subject
from wavejax.evaluation.tasks import TASKS
from wavejax.store.shape import CacheShape

PROSE = Haystack("prose", tuple(f"word{i % 97}." if i % 11 == 0 else f"w{i}" for i in range(9000)))
LENGTH = 2600  # room for drift's answer too

# Of GENERATOR 1. Where a sample is to be another one, raise GENERATOR, and record these anew: an
# evaluation that is begun must not go on with other samples.
FIRSTS = {
    "niah_single_1": ("3bd5df17f585", "73395c7776c5"),
    "niah_single_2": ("b13655655da2", "4ed6d275a6f3"),
    "niah_single_3": ("3cd4cc7fa29a", "941a35d59313"),
    "niah_multikey_1": ("121ed069eba6", "d7347cb37279"),
    "niah_multikey_2": ("db1ae8e64406", "13eabe24e16c"),
    "niah_multikey_3": ("76ba5217f83e", "7b7ca6008074"),
    "niah_multivalue": ("287be47ba709", "6f4f533c1b67"),
    "niah_multiquery": ("6258e732531b", "d1df86298f12"),
    "vt": ("0794465270b0", "005c0d08b037"),
    "cwe": ("c5396492e695", "44bf6882ab08"),
    "fwe": ("a997208503a0", "15aa0af14a75"),
    "key_value": ("fb65538178a3", "354fd109cd2e"),
    "many_needles": ("a6b3a94e7d13", "a2cfabb001ad"),
    "drift": ("f47f5ee65274", "8273cdea897f"),
    "perplexity": ("f8f59fb58ca5", "368121a7454a"),
}


def write_model(folder, **config):
    folder.mkdir()
    config = TINY | {"max_position_embeddings": 4096} | config
    write_folder(folder, config, make_tensors(config))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


def subject_of(folder):
    return Subject(open_checkpoint(folder), load_tokenizer(folder), "float32")


def settings(folder, haystack=PROSE, seed=42):
    subject = subject_of(folder)
    return settings_of(subject, Material(subject.tokenizer, haystack), seed)


def changed(folder, before):
    after = settings(folder)
    return {name for name in before if before[name] != after[name]}


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_same_files_are_the_same_settings(folder, tmp_path):
    first = settings(folder)
    assert first == settings(folder)
    assert json.loads(json.dumps(first)) == first
    (tmp_path / "other").mkdir()
    assert first == settings(write_model(tmp_path / "other" / "model"))
    assert (first["generator"], first["seed"]) == (GENERATOR, 42)


def test_what_differs_is_told_by_its_own_setting(folder):
    before = settings(folder)
    tokenizer = folder / "tokenizer_config.json"
    edit(tokenizer, chat_template=TEMPLATE + " ")
    assert changed(folder, before) == {"chat_template_sha256"}
    edit(tokenizer, chat_template=TEMPLATE, add_bos_token=False)
    assert changed(folder, before) == {"tokenizer_sha256"}
    edit(tokenizer, add_bos_token=True)
    assert changed(folder, before) == set()
    # The same vocabulary, cut in another way before it is looked up.
    whole = json.loads((folder / "tokenizer.json").read_text())
    pre = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    edit(folder / "tokenizer.json", pre_tokenizer=pre)
    assert changed(folder, before) == {"tokenizer_sha256"}
    swapped = whole["model"] | {"vocab": whole["model"]["vocab"] | {"a": 65, "b": 64}}
    edit(folder / "tokenizer.json", pre_tokenizer=whole["pre_tokenizer"], model=swapped)
    assert changed(folder, before) == {"tokenizer_sha256"}


def test_other_weights_of_the_same_name_and_sizes_are_another_model(folder):
    before = settings(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert changed(folder, before) == {"model_sha256"}
    content[-1] ^= 1
    file.write_bytes(content)
    edit(folder / "config.json", rope_theta=5e5)
    assert changed(folder, before) == {"model_sha256"}


def test_all_parts_of_a_split_file_count(tmp_path):
    parts = [tmp_path / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for file in (*parts, tmp_path / "m-00001-of-00002.gguf", tmp_path / "n-00001-of-00003.gguf"):
        file.touch()
    assert origins._weights(parts[0]) == parts
    assert origins._weights(tmp_path / "n-00001-of-00003.gguf") == [
        tmp_path / "n-00001-of-00003.gguf"
    ]


def test_a_haystack_is_told_by_its_words(folder):
    before = settings(folder)
    other = Haystack("prose", (*PROSE.words[:-1], "end"))
    after = settings(folder, other, seed=43)
    assert {name for name in before if before[name] != after[name]} == {"haystack_sha256", "seed"}


def parts(tasks, firsts=None, batch=2, unroll=False):
    shape = CacheShape(layers=2, kv_heads=3, head_dim=64)
    return parts_of(tasks, firsts or {}, dict.fromkeys(tasks, batch), unroll, shape)


def test_parts_tell_tasks_samples_words_and_how_answers_are_drawn(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    tasks = {name: TASKS[name] for name in ("vt", "drift")}

    def first(seed=42):
        material = Material(tokenizer, PROSE)
        return {("vt", 2600): tasks["vt"].sample(material, 2600, seed, 0)}

    before = parts(tasks, first())
    assert parts(tasks, first()) == before
    key = "first sample of vt at 2600 tokens"
    assert {name for name in before if before[name] != parts(tasks, first(43))[name]} == {key}
    longer = tasks | {"vt": dataclasses.replace(tasks["vt"], hops=5)}
    assert {n for n in before if before[n] != parts(longer, first())[n]} == {"task vt"}
    monkeypatch.setattr(origins, "word_list", lambda kind: (kind, "another"))
    assert {n for n in before if before[n] != parts(tasks, first())[n]} == {"words_sha256"}
    monkeypatch.undo()
    drawn = "answers drawn of drift"
    for changes in ({"batch": 1}, {"unroll": True}):
        assert {n for n in before if before[n] != parts(tasks, first(), **changes)[n]} == {drawn}
    monkeypatch.setattr("jax.__version__", "0.0")
    assert parts(tasks)[drawn] == before[drawn] | {"jax": "0.0"}
    # Greedy answers are no draws: they go on with any batch.
    assert not any("drawn" in name for name in parts({"vt": TASKS["vt"]}))


def test_word_lists_that_are_not_installed_are_no_part(monkeypatch):
    def absent(kind):
        raise words.InputError("not installed")

    monkeypatch.setattr(origins, "word_list", absent)
    assert "words_sha256" not in parts({"vt": TASKS["vt"]})


def test_samples_are_those_of_their_generator(folder, monkeypatch):
    lists = {kind: tuple(f"{kind}{i}" for i in range(500)) for kind in words.Kind.__args__}
    for module in (niah, word_counting):
        monkeypatch.setattr(module, "word_list", lists.get)
    material = Material(load_tokenizer(folder), PROSE)

    def mark(task, index):
        sample = task.sample(material, LENGTH, 42, index)
        text = tuple(map(material.tokenizer.decode, (sample.tokens, sample.continuation)))
        return hashlib.sha256(repr((text, sample.references)).encode()).hexdigest()[:12]

    found = {name: (mark(task, 0), mark(task, 3)) for name, task in TASKS.items()}
    assert GENERATOR == 1
    assert found == FIRSTS


def test_a_sample_is_told_by_all_that_it_is(folder):
    sample = TASKS["vt"].sample(Material(load_tokenizer(folder), PROSE), LENGTH, 42, 0)
    others = [
        dataclasses.replace(sample, tokens=(*sample.tokens[:-1], 0)),
        dataclasses.replace(sample, new_tokens=31),
        dataclasses.replace(sample, references=sample.references[1:]),
        dataclasses.replace(sample, continuation=(1,)),
    ]
    assert len({one.sha256 for one in (sample, *others)}) == 5


def test_a_template_that_writes_the_date_gives_the_same_sample_tomorrow(folder):
    dated = (
        "{%- if not date is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}"
        "{%- macro day() %}{{ strftime_now('%Y') }}{% endmacro -%}"
        "<user>{{ date }} {{ day() }} {{ messages[0].content }}<answer>"
    )
    edit(folder / "tokenizer_config.json", chat_template=dated)
    material = Material(load_tokenizer(folder), load_haystack())
    assert material.tokenizer.chat_text([{"role": "user", "content": "hi"}]) == (
        "<user>26 Jul 2024 26 Jul 2024 hi<answer>"
    )
    # Of a material made anew it is the same template.
    again = Material(material.tokenizer, material.haystack)
    assert again.tokenizer.chat_template == material.tokenizer.chat_template
