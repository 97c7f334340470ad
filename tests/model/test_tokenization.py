"""Tokenizers: as their own files say, special tokens at both ends of a text, ids beyond the model's vocabulary."""

import json
import shutil

import pytest
import tiny_models
from tiny import words_for
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, GPT2TokenizerFast

from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.evaluation.perplexity import prompt_ids
from alps_exp.model import loading, tokenization
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace

TEXT = " The old  sailor repairs 1921 boats\n\nby the river, café 日本. "


def local(folder):
    return {"name": "local", "path": str(folder)}


def load_tokenizer(node):
    return loading.load_tokenizer(loading.locate(node))


def under_class(model, folder, name):
    """A copy of a checkpoint whose tokenizer_config.json names another class."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    return folder


def appending_eos(model, folder, first=""):
    """A copy of a checkpoint whose tokenizer puts </s> after each text."""
    shutil.copytree(model, folder)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=f"{first} $A </s>".strip(), special_tokens=tokens)
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2TokenizerFast", "NoSuch"])
def test_the_file_decides_about_the_tokens_whatever_class_is_named(tiny_llama, tmp_path, name):
    file = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    copy = under_class(tiny_llama, tmp_path / "model", name)
    tokenizer = load_tokenizer(local(copy))
    assert tokenizer(TEXT).input_ids == file.encode(TEXT).ids
    alike = AutoTokenizer.from_pretrained(copy)(TEXT).input_ids == file.encode(TEXT).ids
    note = loading.tokenizer_note(loading.locate(local(copy)))
    assert (note is None) == alike
    if name == "LlamaTokenizerFast":
        assert "tokenizer.json splits texts otherwise than transformers' LlamaTokenizer" in note
        # What is saved beside a pruned model is read by transformers as it was here.
        tokenizer.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved/config.json").write_text((copy / "config.json").read_text())
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXT).input_ids == file.encode(TEXT).ids


def test_a_class_that_agrees_with_the_file_is_kept(tiny_gpt2, tmp_path):
    copy = under_class(tiny_gpt2, tmp_path / "model", "GPT2Tokenizer")
    tokenizer = load_tokenizer(local(copy))
    assert isinstance(tokenizer, GPT2TokenizerFast) and loading.tokenizer_note(loading.locate(local(copy))) is None


def test_a_class_that_cannot_read_the_file_is_refused(tiny_llama, tmp_path):
    copy = under_class(tiny_llama, tmp_path / "model", "GemmaTokenizer")
    with pytest.raises(
        UserError, match=r"tokenizer of .* cannot be read .* set tokenizer_class .* to TokenizersBackend"
    ):
        load_tokenizer(local(copy))


def test_tokens_added_beside_the_file_are_kept(tiny_llama, tmp_path):
    copy = under_class(tiny_llama, tmp_path / "model", "TokenizersBackend")
    file = copy / "tokenizer_config.json"
    added = {"384": {"content": "sailor", "special": False}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": added}))
    assert (
        384 in load_tokenizer(local(copy))(TEXT).input_ids
        and loading.tokenizer_note(loading.locate(local(copy))) is None
    )


def test_a_changed_file_is_read_again(tiny_llama, tmp_path):
    copy = under_class(tiny_llama, tmp_path / "model", "TokenizersBackend")
    assert load_tokenizer(local(copy)) is load_tokenizer(local(copy))
    before = load_tokenizer(local(copy))("a").input_ids
    shutil.rmtree(copy)
    appending_eos(tiny_llama, copy)
    assert load_tokenizer(local(copy))("a").input_ids == [before[-1], 2]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("left", ["nothing", "tokenizer_config.json", "chat_template.jinja", "vocab.json"])
def test_a_checkpoint_without_a_vocabulary_is_refused(request, tmp_path, kind, left):
    """transformers makes an empty tokenizer for most families, to which every text is unknown."""
    model = request.getfixturevalue(f"tiny_{kind}")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    content = {"vocab.json": '{"a": 0}', "chat_template.jinja": "{{ messages }}"}
    content["tokenizer_config.json"] = (model / "tokenizer_config.json").read_text()
    if left in content:
        (tmp_path / left).write_text(content[left])
    with pytest.raises(UserError) as caught:
        load_tokenizer(local(tmp_path))
    message = str(caught.value)
    assert ("no tokenizer" in message or left == "vocab.json") and "copy" in message and "\n" not in message


def test_a_vocabulary_without_a_tokenizer_json_will_do(tiny_gpt2, tmp_path):
    content = json.loads((tiny_gpt2 / "tokenizer.json").read_text())["model"]
    (tmp_path / "config.json").write_text((tiny_gpt2 / "config.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, content["merges"])))
    wanted = AutoTokenizer.from_pretrained(tiny_gpt2)(TEXT).input_ids
    assert load_tokenizer(local(tmp_path))(TEXT).input_ids == wanted
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer|`merges` must be"):
        load_tokenizer(local(tmp_path))


def test_damaged_files_are_named(tiny_llama, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        for number, content in enumerate(("", "{", "[]", '{"model": 3}', "\0\xff")):
            copy = tmp_path / f"{file}-{number}"
            shutil.copytree(tiny_llama, copy)
            (copy / file).write_text(content, encoding="latin-1")
            try:
                load_tokenizer(local(copy))
            except UserError as error:
                assert f"tokenizer of model.path={copy} cannot be read" in str(error) and "\n" not in str(error)
            else:
                assert (file, content) == ("tokenizer_config.json", '{"model": 3}')


def test_special_tokens_at_both_ends(tiny_llama, tmp_path):
    describe = tokenization.describe_bos
    assert describe(tiny_models.tokenizer("llama"), "auto") == "auto: the tokenizer adds <s> to each text"
    assert describe(tiny_models.tokenizer("gpt2"), "auto") == "auto: the tokenizer adds none"
    after = load_tokenizer(local(appending_eos(tiny_llama, tmp_path / "after")))
    assert tokenization.special_tokens(after) == ([], ["</s>"])
    assert describe(after, "auto") == "auto: the tokenizer adds </s> after each text"
    both = load_tokenizer(local(appending_eos(tiny_llama, tmp_path / "both", "<s>")))
    assert tokenization.special_tokens(both) == (["<s>"], ["</s>"])
    assert describe(both, "auto") == "auto: the tokenizer adds <s> before and </s> after each text"
    assert describe(both, "false") == "none"
    # A prompt is to be continued: nothing ends it.
    config = loading.resolve(local(tiny_llama)).config
    plain = both("The boat", add_special_tokens=False).input_ids
    assert prompt_ids(both, "The boat", 4, config) == [1, *plain] and prompt_ids(after, "The boat", 4, config) == plain


def test_prompts_that_cannot_be_continued(tiny_llama):
    tokenizer, config = tiny_models.tokenizer("llama"), loading.resolve(local(tiny_llama)).config
    tokenizer.add_tokens(["harbour"])
    for prompt, tokens, words in (
        ("The harbour", 4, "'harbour', whose id 384 is beyond the model's 384 embeddings"),
        ("The boat", 256, "beyond the model's context of 256 tokens"),
        ("half \ud83d", 4, "'\\ud83d', half of a surrogate pair"),
    ):
        with pytest.raises(UserError) as caught:
            prompt_ids(tokenizer, prompt, tokens, config)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def words_of(model, text_file, *more):
    return words_for(model, text_file, "nsamples=4", "seqlen=64", "eval=none", "method=wanda", "sparsity=0.5", *more)


@pytest.mark.slow
def test_a_run_says_that_the_file_decided(tiny_llama, text_file, tmp_path, capsys):
    evaluated = ["eval=perplexity", "eval.windows=4", "eval.seqlen=64", "eval.sample_tokens=4"]
    odd = under_class(tiny_llama, tmp_path / "odd", "LlamaTokenizerFast")
    right, found = (
        runs.run(compose(words_of(model, text_file, *evaluated)), tmp_path / f"run-{model.name}")
        for model in (tiny_llama, odd)
    )
    assert [row["value"] for row in found["evaluations"]] == [row["value"] for row in right["evaluations"]]
    assert found["sample"] == right["sample"]
    assert len(found["warnings"]) == len(right["warnings"]) + 1 and "LlamaTokenizer" in found["warnings"][0]
    assert capsys.readouterr().err.count("warning: tokenizer.json splits texts otherwise") == 1


@pytest.mark.slow
def test_ids_beyond_the_vocabulary_are_refused_before_the_model_is_loaded(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "model", lambda *_: pytest.fail("the model is loaded"))
    copy, clean = tmp_path / "model", tmp_path / "clean.txt"
    shutil.copytree(tiny_llama, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["sailor"])
    tokenizer.save_pretrained(copy)
    clean.write_text(text_file.read_text().replace("sailor", "seaman"))
    evaluated = ["eval=perplexity", "eval.seqlen=64", "eval.sample_tokens=0"]
    for number, (file, more, words) in enumerate(
        (
            (text_file, [], "calibration text has"),
            (clean, [*evaluated, f"data.eval_path={text_file}"], "evaluation text has"),
            (clean, ["eval.sample_tokens=4", "eval.prompt='The sailor'"], "eval.prompt='The sailor' has"),
        )
    ):
        with pytest.raises(UserError, match=f"{words} the token 'sailor', whose id 384"):
            runs.run(compose(words_of(copy, file, *more)), tmp_path / str(number))


@pytest.mark.parametrize(
    ("key", "file", "part"),
    [
        ("data.path", "a.pdf", r"\.pdf is not allowed; give one of \.txt"),
        ("data.eval_path", "a.csv", r"\.csv is not allowed"),
        ("data.path", None, r"needs data\.path=FILE"),
        ("eval.path", "a.doc", r"\.doc is not allowed"),
    ],
)
def test_what_is_wrong_with_texts_is_found_in_validation(tiny_llama, text_file, tmp_path, key, file, part):
    if file is not None:
        (tmp_path / file).write_text("x")
    value = "null" if file is None else tmp_path / file
    words = words_of(tiny_llama, text_file, "eval=perplexity", "plan=true", "eval.seqlen=64", f"{key}={value}")
    with pytest.raises(UserError, match=part):
        resolve(compose(words))
