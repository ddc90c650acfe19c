import json
import shutil
import sys

import pytest
import safetensors.torch
import torch
import transformers
from tiny import UNLIKE_GPT2, some_tokens, tiny

from flashlab.errors import UserError
from flashlab.gpt2.huggingface import CONFIG, INDEX, WEIGHTS, load, read_config, save
from flashlab.gpt2.model import EPSILON, GPT


def their_logits(folder):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(some_tokens()).logits


def our_logits(folder):
    model = GPT(read_config(folder)).eval()
    load(model, folder)
    with torch.no_grad():
        return model(some_tokens())


@pytest.fixture
def theirs(tmp_path):
    """Make a folder with a model that transformers wrote."""

    def make(max_shard_size="5GB", **changes):
        torch.manual_seed(0)
        shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 211}
        config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, initializer_range=0.2, **changes)
        folder = tmp_path / "theirs"
        model = transformers.GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():  # new biases are 0, and would not be missed
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture
def ours(tmp_path):
    """Save a small model, and return its folder."""
    save(tiny(), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"bias": False}], ids=["gpt2", "untied", "no bias"])
def test_transformers_reads_what_is_saved(changes, tmp_path):
    model = tiny(**changes)
    save(model, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(tmp_path / "ours"), model(some_tokens()), rtol=0, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]
    assert len({path.stat().st_mode for path in (tmp_path / "ours").iterdir()}) == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"max_shard_size": "40KB"}, {"n_inner": 128}],
    ids=["gpt2", "untied", "in shards", "n_inner"],
)
def test_what_transformers_saves_is_read(changes, theirs):
    folder = theirs(**changes)
    assert (folder / INDEX).exists() == ("max_shard_size" in changes)
    torch.testing.assert_close(our_logits(folder), their_logits(folder), rtol=0, atol=1e-5)


def test_files_from_before_transformers_named_its_parts_are_read(theirs):
    """GPT-2 as it was published: names without a prefix, and a causal mask in every block."""
    folder = theirs()
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    safetensors.torch.save_file(old, folder / WEIGHTS, {"format": "pt"})
    torch.testing.assert_close(our_logits(folder), their_logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_every_weight_is_the_same(dtype, tmp_path):
    model = tiny().to(dtype)
    save(model, tmp_path)
    other = GPT(read_config(tmp_path)).to(dtype)
    load(other, tmp_path)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert other.config == model.config


def rewrite(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def reweigh(folder, change):
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    change(weights)
    safetensors.torch.save_file(weights, folder / WEIGHTS, {"format": "pt"})


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "no folder": (shutil.rmtree, "config.json: there is no such file; name a folder that holds"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors: there is no such file; fetch it"),
    "config cut": (lambda folder: cut(folder / CONFIG, 50), "config.json: cannot read it"),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "config.json: cannot read it"),
    "weights cut": (lambda folder: cut(folder / WEIGHTS, 9000), "model.safetensors: cannot read it"),
    "header cut": (lambda folder: cut(folder / WEIGHTS, 90), "model.safetensors: cannot read it"),
    "llama": (lambda folder: rewrite(folder, model_type="llama"), "model_type is llama, where GPT-2's is gpt2"),
    "relu": (lambda folder: rewrite(folder, activation_function="relu"), "activation_function is relu, where GPT-2's"),
    "n_inner": (lambda folder: rewrite(folder, n_inner=100), "n_inner is 100, where GPT-2's is 4 n_embd"),
    "no number": (lambda folder: rewrite(folder, n_layer="3"), "n_layer must be a whole number from 1 on; got '3'"),
    "heads": (lambda folder: rewrite(folder, n_head=5), "n_head 5 must divide n_embd 48"),
    "other heads": (lambda folder: rewrite(folder, n_head=8), "n_head is 8, and 4 in the model; make them the same"),
    "other length": (lambda folder: rewrite(folder, n_positions=32), "block_size is 32, and 64 in the model"),
    "other shape": (
        lambda folder: reweigh(folder, lambda weights: weights.update({"transformer.ln_f.bias": torch.ones(47)})),
        r"transformer.ln_f.bias is \[47\], and \[48\] by config.json; fetch both again",
    ),
    "one missing": (
        lambda folder: reweigh(folder, lambda weights: weights.pop("transformer.wpe.weight")),
        "wpe.weight is missing from model.safetensors",
    ),
    "several missing": (
        lambda folder: reweigh(folder, lambda weights: [weights.pop(name) for name in list(weights)[::2]]),
        "and 19 more tensors are missing from model.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_other_checkpoint_is_refused_and_the_model_stays_as_it_was(damage, ours):
    do, complaint = DAMAGES[damage]
    do(ours)
    model = tiny(block_size=64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=complaint) as refused:
        load(model, ours)
    assert "\n" not in str(refused.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["position", "norm", "mlp"])
def test_a_model_that_the_format_has_no_word_for_is_refused(name, ours, tmp_path):
    model = tiny(**{name: UNLIKE_GPT2[name]})
    with pytest.raises(UserError, match=f"format has no {UNLIKE_GPT2[name]} {name}"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=f"{name} is .*, and {UNLIKE_GPT2[name]} in the model; make them the same"):
        load(model, ours)


def test_an_index_that_is_damaged_is_refused(theirs):
    folder = theirs(max_shard_size="40KB")
    (folder / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match=r"index\.json: cannot read it"):
        our_logits(folder)


def test_a_full_disk_leaves_what_was_there(ours, monkeypatch):
    before = {path.name: path.read_bytes() for path in ours.iterdir()}

    def write(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", write)
    with pytest.raises(UserError, match=r"cannot write .*model.safetensors: No space left on device; free space"):
        save(tiny(n_layer=1), ours)
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before


def test_without_safetensors_the_remedy_is_named(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (save, load):
        with pytest.raises(UserError, match="the package safetensors is not installed; `pip install safetensors`"):
            use(tiny(), ours)


def test_shapes_are_read_with_the_defaults_of_the_format(tmp_path):
    """Hugging Face leaves out what is as in GPT-2 of 124 M parameters."""
    (tmp_path / CONFIG).write_text('{"model_type": "gpt2"}')
    config, default = read_config(tmp_path), transformers.GPT2Config()
    assert (config.n_layer, config.n_head, config.n_embd) == (default.n_layer, default.n_head, default.n_embd)
    assert (config.block_size, config.vocab_size) == (default.n_positions, default.vocab_size)
    assert default.layer_norm_epsilon == EPSILON
