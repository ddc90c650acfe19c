import itertools
import math

import pytest
import torch
import transformers
from test_gpt2_model import hugging_face
from tiny import CPU_BACKENDS, UNLIKE_GPT2, some_tokens, tiny

from flashlab.attention import AttentionSpec, BackendUnavailable
from flashlab.errors import UserError
from flashlab.gpt2 import sample
from flashlab.gpt2.config import preset
from flashlab.gpt2.model import GPT, KeyValueCache
from flashlab.gpt2.sample import _backend_of_step, _next_logits, _stepper, generate, restrict

CHOICES = {
    "greedy": {"temperature": 0},
    "plain": {},
    "cold": {"temperature": 0.7},
    "top-k": {"top_k": 20, "temperature": 1.3},
    "top-p": {"top_p": 0.8},
    "both": {"top_k": 50, "top_p": 0.9, "seed": 3},
}


def sampled(model, tokens, count=40, **options):
    return torch.stack(list(generate(model, tokens, count, **options)), dim=1)


def test_greedy_generation_is_that_of_transformers():
    model, tokens = tiny(), some_tokens(3, 10)
    settings = transformers.GenerationConfig(max_new_tokens=50, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        theirs = hugging_face(model).generate(tokens, settings, attention_mask=torch.ones_like(tokens))
    assert sampled(model, tokens, 50, temperature=0).tolist() == theirs[:, 10:].tolist()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_cache_changes_no_token(backend, choice):
    model, tokens = tiny(backend=backend), some_tokens(4, 12)
    found = sampled(model, tokens, **CHOICES[choice])
    assert found.tolist() == sampled(model, tokens, **CHOICES[choice], use_cache=False).tolist()
    assert found.shape == (4, 40)
    assert len(set(map(tuple, found.tolist()))) == 4


@pytest.mark.parametrize("choice", ["greedy", "plain"])
def test_the_cache_changes_no_token_of_a_model_that_is_unlike_gpt2(choice):
    model, tokens = tiny(**UNLIKE_GPT2), some_tokens(2, 30)
    found = sampled(model, tokens, 80, **CHOICES[choice])  # beyond block_size, which rotary positions allow
    assert found.tolist() == sampled(model, tokens, 80, **CHOICES[choice], use_cache=False).tolist()


def test_a_seed_repeats_itself_and_another_does_not():
    model, tokens = tiny(), some_tokens(1, 5)
    first, again, other = (sampled(model, tokens, seed=seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_tokens_are_drawn_with_their_probabilities():
    model = tiny()
    tokens = some_tokens(1, 6)
    with torch.no_grad():
        probabilities = (model(tokens)[0, -1] / 2).softmax(-1)
    drawn = next(generate(model, tokens.expand(20_000, -1), 1, temperature=2.0))
    found = torch.bincount(drawn, minlength=211) / 20_000
    band = 5 * (probabilities * (1 - probabilities) / 20_000).sqrt() + 1e-4
    assert ((found - probabilities).abs() < band).all()
    assert probabilities.max() < 0.5  # else there is little to draw


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (1, 1.0), (7, 1.0), (400, 1.0), (None, 0.5), (9, 0.01)])
def test_top_k_and_top_p_are_those_of_transformers(top_k, top_p):
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 211)
    expected = logits
    if top_k is not None:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(restrict(logits, top_k, top_p), expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-50])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature):
    model, tokens = tiny(), some_tokens(2, 8)
    assert torch.equal(sampled(model, tokens, 5, temperature=temperature), sampled(model, tokens, 5, temperature=0))


def test_a_tiny_top_p_leaves_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for top_p in (1e-46, 1e-50):
        assert restrict(logits, None, top_p).tolist() == [[-math.inf, 3.0, -math.inf]]


def test_in_16_bits_the_likeliest_tokens_do_not_tie():
    """Far from 0 the logits of a step in bfloat16 would be multiples of 0.5."""
    model = tiny().bfloat16()
    with torch.no_grad():
        model.ln_f.weight.fill_(0)
        model.ln_f.bias.fill_(1)
        model.wte.weight.copy_(-torch.linspace(1.5, 1.6, model.config.padded_vocab_size)[:, None])
        logits = _next_logits(model, model.head_weight.float(), some_tokens(1, 4), None)
    assert logits.dtype == torch.float32
    assert len(logits[0].unique()) == len(model.wte.weight[: model.config.vocab_size, 0].unique()) > 10


def test_the_backend_of_a_step_is_what_auto_takes_for_its_cache(monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "resolve", lambda *arguments: asked.append(arguments) or "chosen")
    model = tiny(backend="auto")
    cache = KeyValueCache(model.config, 2, 40, torch.device("cpu"), torch.float32)
    assert _backend_of_step(model, cache) == "chosen"
    spec = AttentionSpec(2, 1, 40, 4, 4, 12, torch.float32, torch.device("cpu"), causal=True, layout="cache")
    assert asked == [("auto", spec)]


def test_tokens_come_one_by_one():
    model, tokens, calls = tiny(), some_tokens(2, 8), []
    model.ln_f.register_forward_hook(lambda *_: calls.append(1))
    stream = generate(model, tokens, 30)
    for count in range(1, 4):
        token = next(stream)
        assert (token.shape, token.dtype, len(calls)) == ((2,), torch.int64, count)
        assert torch.is_grad_enabled()  # between tokens the caller is not under no_grad
    assert torch.equal(torch.stack(list(itertools.islice(generate(model, tokens, 30), 3)))[-1], token)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stop_token_ends_its_sequence_and_the_last_one_the_iterator(use_cache):
    model, tokens = tiny(), some_tokens(3, 8)
    free = sampled(model, tokens, 50, seed=2).tolist()
    stop = free[0][20]
    ends = [sequence.index(stop) if stop in sequence else 50 for sequence in free]
    stopped = sampled(model, tokens, 50, seed=2, stop=stop, use_cache=use_cache).tolist()
    first = min(ends)
    assert [sequence[: first + 1] for sequence in stopped] == [sequence[: first + 1] for sequence in free]
    row = ends.index(first)
    assert set(stopped[row][first:]) == {stop}
    alone = sampled(
        model, tokens[:1], 50, temperature=0, stop=sampled(model, tokens[:1], 50, temperature=0)[0, 4].item()
    )
    assert alone.shape[1] <= 5
    assert alone[0, -1] not in alone[0, :-1]


def test_bfloat16_by_autocast_and_by_weights_goes_through_the_cache():
    tokens = some_tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert sampled(tiny(), tokens, 5).shape == (2, 5)
    assert sampled(tiny().bfloat16(), tokens, 5).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        ({"temperature": -0.1}, r"temperature must be 0 or more; got -0\.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more; got nan"),
        ({"top_k": 0}, "top_k must be 1 or more; got 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1; got 0\.0"),
        ({"max_new_tokens": 56}, "65 tokens are more than block_size 64"),
        ({"tokens": torch.tensor([[3, 211]])}, "token 211 is not among the model's 211; take the tokenizer"),
        ({"tokens": torch.tensor([[3, -1]])}, "token -1 is not among the model's 211; take the tokenizer"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_once(options, complaint):
    tokens = options.pop("tokens", some_tokens(1, 10))
    with pytest.raises(UserError, match=complaint):
        generate(tiny(), tokens, **{"max_new_tokens": 5} | options)


def test_the_longest_sequence_fills_the_positions():
    model, tokens = tiny(), some_tokens(1, 10)
    assert sampled(model, tokens, 55).shape == (1, 55)  # the last is drawn and needs no position


def test_misuse_and_an_unavailable_backend_are_refused():
    with pytest.raises(ValueError, match=r"the model is in training mode; call model\.eval\(\) first"):
        generate(tiny().train(), some_tokens(), 5)
    with pytest.raises(ValueError, match=r"tokens must be \[batch, length\] of at least one token; got \(2, 0\)"):
        generate(tiny(), some_tokens(2, 0), 5)
    with pytest.raises(BackendUnavailable, match=r"flash-attn 4 reads places of a cache|needs a CUDA device"):
        list(generate(tiny(backend="flash_attention_4"), some_tokens(), 5))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "standard", "sdpa_math", "flex_attention"])
def test_on_a_gpu_the_cache_changes_no_token(backend):
    torch.set_float32_matmul_precision("highest")
    model, standard = (tiny(backend=name, n_embd=64, block_size=128).cuda() for name in (backend, "standard"))
    tokens = some_tokens(3, 10).cuda()
    for options in ({"temperature": 0}, {"seed": 1}, {"top_k": 20, "top_p": 0.9}):
        found = sampled(model, tokens, 100, **options)
        assert found.tolist() == sampled(standard, tokens, 100, **options, use_cache=False).tolist()


@pytest.mark.gpu
def test_on_a_gpu_512_tokens_of_gpt2_are_the_same_with_the_cache():
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model, tokens = GPT(preset("gpt2")).eval().cuda(), some_tokens(2, 16, 50257).cuda()
    found = sampled(model, tokens, 512)
    assert found.tolist() == sampled(model, tokens, 512, use_cache=False).tolist()


@pytest.mark.gpu
def test_on_a_gpu_no_token_is_waited_for():
    drawn = generate(tiny(n_embd=64).cuda(), some_tokens(2, 10).cuda(), 30, top_k=20, top_p=0.9)
    next(drawn), next(drawn)  # the graph is captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(drawn)) == 28
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "sdpa_cudnn", "auto"])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_a_cache_in_bfloat16_is_as_exact_as_all_positions_anew(autocast, backend):
    """By the project's rule, token after token by a CUDA graph: some two tokens are too close to compare draws."""
    exact, model = tiny(n_embd=64).cuda(), tiny(n_embd=64, backend=backend).cuda()
    model = model if autocast else model.bfloat16()
    tokens = some_tokens(2, 40).cuda()
    cache = KeyValueCache(model.config, 2, 40, tokens.device, torch.bfloat16)
    table = model.head_weight.detach().float()
    with torch.no_grad():
        right = exact(tokens)[:, 9:]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            try:
                rough = model(tokens)[:, 9:].float()
                found = [_next_logits(model, table, tokens[:, :10], cache)]
            except BackendUnavailable as reason:
                pytest.skip(str(reason))
            step = _stepper(model, table, cache)
        found += [step(tokens[:, index : index + 1]).clone() for index in range(10, 40)]
    error, allowed = ((logits - right).abs().max() for logits in (torch.stack(found, dim=1).float(), rough))
    assert error <= 2 * allowed
