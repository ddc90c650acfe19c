import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny

from flashlab.cli import main
from flashlab.gpt2 import sample_command
from flashlab.gpt2.huggingface import CONFIG, WEIGHTS, save
from flashlab.gpt2.module import load_gpt
from flashlab.gpt2.sample import generate
from flashlab.gpt2.tokenizer import ByteTokenizer, load_tokenizer

TRAINED = {"vocab_size": 257, "block_size": 128}


def write_run(folder, model):
    """Write what training leaves of a model."""
    (folder / "checkpoints").mkdir(parents=True)
    hyper_parameters = {"model": asdict(model.config), "tokenizer": ByteTokenizer().describe()}
    weights = {f"gpt.{name}": weight for name, weight in model.state_dict().items()}
    content = {"hyper_parameters": hyper_parameters, "state_dict": weights}
    torch.save(content, folder / "checkpoints/best.ckpt")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny(**TRAINED))


def expected(prompt, count, model=None, **options):
    """The text that `generate` gives, whole, up to the end of text."""
    model, tokenizer = model or tiny(**TRAINED), ByteTokenizer()
    tokens = torch.tensor([tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]])
    drawn = [int(token) for token in generate(model, tokens, count, stop=tokenizer.end_of_text, **options)]
    if tokenizer.end_of_text in drawn:
        drawn = drawn[: drawn.index(tokenizer.end_of_text)]
    return prompt + tokenizer.decode(drawn)


def command(capsys, *arguments):
    """Run `flashlab gpt2`, and return exit code, output and errors."""
    code = main(["gpt2", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *arguments):
    code, out, err = command(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.mark.parametrize("prompt", ["null", "1.0", "[a, b]", "{a: 1}", "a: b", "- x", "#", "ä\n  b\n"])
def test_a_prompt_is_taken_as_it_is(prompt, run, capsys):
    _, out, _ = command(capsys, "sample", run, "--prompt", prompt, "--max_new_tokens", 5)
    assert out == expected(prompt, 5) + "\n"


def test_what_an_encoding_has_no_word_for_is_replaced(run, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["gpt2", "sample", str(run), "--prompt", "aäb", "--max_new_tokens", "1"]) == 0
    assert out.buffer.getvalue().startswith(b"a?b")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.5, "top_k": 20, "seed": 7},
        {"top_p": 0.5, "seed": 2**63 - 1},
    ],
    ids=str,
)
def test_the_text_is_what_the_model_generates(options, run, capsys):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    code, out, err = command(capsys, "sample", run, "--prompt", "def main(", "--max_new_tokens", 60, *flags)
    assert (code, err) == (0, "")
    assert out == expected("def main(", 60, **options) + "\n"


def test_a_run_of_gpt2_train_is_sampled_and_exported(token_set, tmp_path, capsys):
    run = tmp_path / "run"
    options = {
        "data.path": token_set,
        "data.batch_size": 4,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 32,
        "model.block_size": 64,
        "optimizer.warmup_steps": 1,
        "trainer.max_steps": 2,
        "trainer.global_batch_tokens": 256,
        "trainer.val_every_n_steps": 2,
        "trainer.val_batches": 1,
        "run": run,
    }
    assert command(capsys, "train", *(f"--{name}={value}" for name, value in options.items()))[0] == 0
    how = ("--prompt", "def ", "--max_new_tokens", 60, "--seed", 5)
    code, out, _ = command(capsys, "sample", run, *how)
    assert (code, out) == (0, expected("def ", 60, load_gpt(run)[0], seed=5) + "\n")
    assert command(capsys, "export", run, "--out", tmp_path / "hf")[0] == 0
    assert command(capsys, "sample", tmp_path / "hf", *how)[:2] == (0, out)


def test_without_a_prompt_a_text_is_begun_behind_the_end_of_one(run, capsys):
    assert command(capsys, "sample", run, "--max_new_tokens", 40)[1] == expected("", 40) + "\n"


def test_by_default_the_text_fills_the_block(run, capsys):
    _, out, _ = command(capsys, "sample", run, "--prompt", "x" * 100, "--seed", 3)
    assert out == expected("x" * 100, 29, seed=3) + "\n"


def test_the_prompt_comes_from_a_file_or_from_standard_input(run, tmp_path, capsys, monkeypatch):
    text = "Grüße,\nWelt\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    how = ("sample", run, "--max_new_tokens", 20)
    right = command(capsys, *how, "--prompt", text)
    assert right[1].startswith(text)
    assert command(capsys, *how, "--prompt_file", tmp_path / "prompt.txt") == right
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert command(capsys, *how, "--prompt_file", "-") == right


def test_several_samples_differ_and_follow_each_other(run, capsys):
    how = ("sample", run, "--prompt", "ab", "--max_new_tokens", 30, "--num_samples", 3)
    code, out, _ = command(capsys, *how)
    assert code == 0
    samples = [part.partition("\n")[2] for part in out.split("--- ")[1:]]
    assert [part.partition("\n")[0] for part in out.split("--- ")[1:]] == ["1 of 3", "2 of 3", "3 of 3"]
    assert len(set(samples)) == 3
    assert all(sample.startswith("ab") for sample in samples)
    assert command(capsys, *how)[1] == out
    assert command(capsys, *how, "--seed", 1)[1] != out


def test_a_text_ends_where_the_model_ends_it(run, capsys, monkeypatch):
    ends = [72, 105, ByteTokenizer().end_of_text, 33, 33]
    monkeypatch.setattr(sample_command, "generate", lambda *_, **__: (torch.tensor([token]) for token in ends))
    assert command(capsys, "sample", run)[1] == "Hi\n"


def test_pieces_come_at_once_and_a_character_when_it_is_whole(run, monkeypatch):
    """What is on the terminal after each token: never half a character, never a token late."""
    text, seen, shown = "aä🙂b", [], []

    def drawn(*_, **__):
        for byte in [*text.encode(), 0xC3]:  # the last one is never finished
            yield torch.tensor([byte])
            seen.append("".join(shown))

    monkeypatch.setattr(sample_command, "generate", drawn)
    monkeypatch.setattr("builtins.print", lambda *texts, end="\n", **_: shown.append("".join(texts) + end))
    assert main(["gpt2", "sample", str(run), "--prompt", "> "]) == 0
    assert seen == ["> a", "> a", "> aä", "> aä", "> aä", "> aä", "> aä🙂", "> aä🙂b", "> aä🙂b"]
    assert "".join(shown) == "> aä🙂b\N{REPLACEMENT CHARACTER}\n"


def test_the_backend_that_a_model_was_trained_with_does_not_decide(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny(**TRAINED, backend="flash_attention_2"))
    how = ("sample", run, "--prompt", "ab", "--max_new_tokens", 10, "--temperature", 0)
    assert command(capsys, *how)[1] == expected("ab", 10, temperature=0) + "\n"
    assert command(capsys, *how, "--backend", "standard")[1] == expected("ab", 10, temperature=0) + "\n"
    if not torch.cuda.is_available():
        assert "flash_attention_2" in refused(capsys, *how, "--backend", "flash_attention_2")


def test_a_run_of_another_model_is_no_damaged_one(run, tmp_path, capsys):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    torch.save({"hyper_parameters": {"model": {}}, "state_dict": {}}, other / "checkpoints" / "best.ckpt")
    assert "best.ckpt was not written by `flashlab gpt2 train`; give the folder of a" in refused(
        capsys, "sample", other
    )


def test_a_reader_that_goes_away_ends_it_quietly(run):
    code = "import sys; from flashlab.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["gpt2", "sample", str(run), "--max_new_tokens", "120"]
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-c", code, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_what_is_exported_is_read_by_transformers_and_sampled_as_the_run(run, tmp_path, capsys):
    code, out, _ = command(capsys, "export", run, "--out", tmp_path / "hf")
    assert code == 0
    assert out.startswith(f"wrote {tmp_path / 'hf'}: ")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(257, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, tiny(**TRAINED)(tokens), rtol=0, atol=1e-5)
    how = ("--prompt", "import ", "--max_new_tokens", 50, "--seed", 4)
    assert command(capsys, "sample", tmp_path / "hf", *how)[:2] == command(capsys, "sample", run, *how)[:2]


def test_a_folder_of_hugging_face_takes_byte_pairs_from_itself_or_from_the_option(vocabulary, tmp_path, capsys):
    tokenizer = load_tokenizer("gpt2", vocabulary)
    model = tiny(vocab_size=tokenizer.vocab_size, block_size=128)
    save(model, tmp_path)
    how = ("sample", tmp_path, "--prompt", "the words", "--max_new_tokens", 20, "--temperature", 0)
    code, out, _ = command(capsys, *how, "--vocabulary", vocabulary)
    tokens = torch.tensor([tokenizer.encode("the words").tolist()])
    drawn = [int(token) for token in generate(model, tokens, 20, temperature=0)]
    assert (code, out) == (0, "the words" + tokenizer.decode(drawn) + "\n")
    for theirs, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / name).write_bytes((vocabulary / theirs).read_bytes())
    assert command(capsys, *how)[1] == out
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"vocab_size": 50257}))
    assert "has 50,257 tokens, and the vocabulary" in refused(capsys, *how)


def test_a_run_of_byte_pairs_is_exported_with_its_vocabulary(vocabulary, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer("gpt2", vocabulary)
    model = tiny(vocab_size=tokenizer.vocab_size, block_size=128)
    monkeypatch.setattr(sample_command, "load_gpt", lambda run, checkpoint: (model, tokenizer))
    (tmp_path / "run").mkdir()
    assert command(capsys, "export", tmp_path / "run", "--out", tmp_path / "hf")[0] == 0
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [CONFIG, WEIGHTS, "vocabulary.tiktoken"]
    _, kept = sample_command.load_model(tmp_path / "hf")
    assert kept.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt", "x" * 129], "the prompt has 129 tokens, and block_size is 128; give a shorter one"),
        (["--prompt", "x" * 100, "--max_new_tokens", 30], "129 tokens are more than block_size 128"),
        (["--prompt", "ab\udcff"], "--prompt is no UTF-8 at byte 2; convert it"),
        (["--prompt", "x", "--prompt_file", "y"], "--prompt and --prompt_file are two prompts; give one"),
        (["--prompt_file", "missing.txt"], "cannot read --prompt_file missing.txt: No such file or directory"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--top_p", "2"], "top_p must be above 0 and at most 1"),
        (["--top_k", "0"], "top_k"),
        (["--seed", "-1"], "seed"),
        (["--num_samples", "0"], "num_samples"),
        (["--backend", "flash"], "flash"),
        (["--checkpoint", "other.ckpt"], "other.ckpt does not exist; the checkpoints there are best.ckpt"),
        (["--vocabulary", "vocabulary"], "a run has its tokenizer"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value))[:30],
)
def test_what_cannot_be_sampled_is_one_line_and_nothing_is_printed(arguments, complaint, run, capsys):
    assert complaint in refused(capsys, "sample", run, *arguments)


@pytest.mark.parametrize(
    "arguments", [["sample", "runs/none"], ["export", "runs/none", "--out", "hf"]], ids=lambda a: a[0]
)
def test_a_run_that_is_not_there_is_named(arguments, capsys):
    assert "runs/none: there is no such folder; name a run" in refused(capsys, *arguments)


def test_a_folder_that_is_no_run_is_not_sent_to_be_trained_in(token_set, capsys):
    assert f"{token_set} is not a run of `flashlab gpt2 train`" in refused(capsys, "sample", token_set)


def test_a_prompt_that_is_no_text_is_refused(run, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    complaint = refused(capsys, "sample", run, "--prompt_file", tmp_path / "prompt")
    assert f"--prompt_file {tmp_path / 'prompt'} is no UTF-8 at byte 3; convert it" in complaint


def test_a_folder_of_bytes_takes_no_vocabulary(run, tmp_path, capsys):
    assert command(capsys, "export", run, "--out", tmp_path / "hf")[0] == 0
    assert "bytes have none" in refused(capsys, "sample", tmp_path / "hf", "--vocabulary", tmp_path)
    assert "--checkpoint last.ckpt is for a run" in refused(
        capsys, "sample", tmp_path / "hf", "--checkpoint", "last.ckpt"
    )
    assert command(capsys, "export", run, "--out", tmp_path / "hf")[0] == 0  # once more


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    for folder in (run, run / "checkpoints"):
        assert "holds something other than an exported model" in refused(capsys, "export", run, "--out", folder)
    rotary = write_run(tmp_path / "rotary", tiny(**TRAINED, position="rotary"))
    assert "format has no rotary position" in refused(capsys, "export", rotary, "--out", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "file").touch()
    assert "a file stands where a folder should be" in refused(capsys, "export", run, "--out", tmp_path / "file")

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device; free space there" in refused(capsys, "export", run, "--out", tmp_path / "a/hf")
    assert not (tmp_path / "a").exists()
