import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import CPU_BACKENDS, TINY, UNLIKE_GPT2, some_tokens, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from flashlab.attention import AttentionSpec
from flashlab.attention.backends import why_not
from flashlab.errors import UserError
from flashlab.gpt2.config import PRESETS, GPTConfig, flops_per_token, num_parameters, preset
from flashlab.gpt2.model import GPT

VARIANTS = {
    "gpt2": {},
    "modern": UNLIKE_GPT2,
    "no bias": {"bias": False},
    "recomputed": {"activation_checkpointing": True},
    "rotary, recomputed": {"position": "rotary", "activation_checkpointing": True},
}


def hugging_face(model):
    """Make transformers' GPT-2 with the weights of ours, put there by hand."""
    config = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )
    ours = model.state_dict()
    for name, parameter in theirs.transformer.named_parameters():
        weight = ours[name][: config.vocab_size] if name == "wte.weight" else ours[name]
        is_matrix = name.startswith("h.") and weight.dim() == 2
        parameter.data.copy_(weight.T if is_matrix else weight)
    return theirs.eval()


def check_against_hugging_face(model, tokens):
    """Return the largest differences of logits, loss and gradients (these in units of their tensor's largest)."""
    theirs = hugging_face(model)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    out = theirs(tokens, labels=tokens)
    out.loss.backward()
    loss = model(tokens, targets)
    loss.backward()
    gradients = 0.0
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.transformer.named_parameters():
        gradient = ours.pop(name)
        if name == "wte.weight":
            assert (gradient[model.config.vocab_size :] == 0).all()
            gradient = gradient[: model.config.vocab_size]
        if name.startswith("h.") and gradient.dim() == 2:
            gradient = gradient.T
        gradients = max(gradients, float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max()))
    assert not ours  # every parameter was compared
    with torch.no_grad():
        logits = float((model(tokens) - out.logits).abs().max())
    return logits, abs(loss.item() - out.loss.item()), gradients


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_logits_loss_and_gradients_are_those_of_transformers(backend):
    assert max(check_against_hugging_face(tiny(backend=backend), some_tokens())) < 1e-4


@pytest.mark.slow
def test_gpt2_of_124_million_is_that_of_transformers():
    torch.manual_seed(0)
    model = GPT(preset("gpt2")).eval()
    differences = check_against_hugging_face(model, some_tokens(batch=1, length=256, vocab_size=50257))
    assert max(differences) < 1e-4, differences


def test_the_modern_options_are_those_of_llama():
    model = tiny(**UNLIKE_GPT2)
    config = model.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.n_inner,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
        )
    ).eval()
    ours = model.state_dict()
    weights = {
        "model.embed_tokens.weight": ours["wte.weight"][: config.vocab_size],
        "model.norm.weight": ours["ln_f.weight"],
        "lm_head.weight": ours["lm_head.weight"][: config.vocab_size],
    }
    for index in range(config.n_layer):
        here, there = f"h.{index}", f"model.layers.{index}"
        for name, weight in zip("qkv", ours[f"{here}.attn.c_attn.weight"].chunk(3), strict=True):
            weights[f"{there}.self_attn.{name}_proj.weight"] = weight
        gate, up = ours[f"{here}.mlp.c_fc.weight"].chunk(2)
        weights |= {f"{there}.mlp.gate_proj.weight": gate, f"{there}.mlp.up_proj.weight": up}
        weights[f"{there}.self_attn.o_proj.weight"] = ours[f"{here}.attn.c_proj.weight"]
        weights[f"{there}.mlp.down_proj.weight"] = ours[f"{here}.mlp.c_proj.weight"]
        weights[f"{there}.input_layernorm.weight"] = ours[f"{here}.ln_1.weight"]
        weights[f"{there}.post_attention_layernorm.weight"] = ours[f"{here}.ln_2.weight"]
    llama.load_state_dict(weights)
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_no_prediction_sees_a_later_token(position, backend):
    model, tokens = tiny(position=position, backend=backend), some_tokens()
    changed = tokens.clone()
    changed[:, 30] = (tokens[:, 30] + 1) % TINY["vocab_size"]
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :30], before[:, :30], rtol=0, atol=0)
    assert (after[:, 30:] != before[:, 30:]).any(dim=-1).all()


@pytest.mark.parametrize(
    ("name", "parameters", "head_dim"),
    [
        ("gpt2", 124_439_808, 64),
        ("gpt2-medium", 354_823_168, 64),
        ("gpt2-large", 774_030_080, 64),
        ("gpt2-xl", 1_557_611_200, 64),
        ("gpt3-125m", 125_226_240, 64),
        ("gpt3-350m", 355_871_744, 64),
        ("gpt3-760m", 760_300_032, 96),
        ("gpt3-1.3b", 1_315_723_264, 128),
        ("gpt3-2.7b", 2_651_553_280, 80),
    ],
)
def test_presets_have_the_published_size(name, parameters, head_dim):
    config = preset(name)
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == parameters
    assert (num_parameters(config), config.head_dim) == (parameters, head_dim)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_as_they_are(variant):
    model = tiny(**VARIANTS[variant])
    padded = replace(model.config, vocab_size=model.config.padded_vocab_size)
    assert num_parameters(padded) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{}, UNLIKE_GPT2], ids=["gpt2", "modern"])
def test_flops_are_those_that_torch_counts(changes):
    """Norms and biases are parameters that torch counts no work for, and part of less than a percent."""
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=1024, **changes)
    model, tokens = GPT(replace(config, backend="standard", loss="full")), some_tokens(2, 128, 1024)
    with FlopCounterMode(display=False) as counted:
        model(tokens, tokens).backward()
    assert flops_per_token(config, 128) * tokens.numel() == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_a_new_model_starts_as_gpt2_does():
    torch.manual_seed(0)
    config = GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=128, vocab_size=1000, tie_weights=False)
    model, tokens = GPT(config), some_tokens(8, 128, 1000)
    assert model(tokens, some_tokens(8, 128, 1000, seed=1)).item() == pytest.approx(math.log(1000), abs=0.08)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
        else:
            std = 0.01 if name == "wpe.weight" else 0.005 if name.endswith("c_proj.weight") else 0.02  # 0.02 / sqrt(16)
            assert parameter[: config.vocab_size].std().item() == pytest.approx(std, rel=0.02), name


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_pad_the_vocabulary_learn_nothing(tied):
    model = tiny(tie_weights=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(some_tokens(), some_tokens(seed=1)).backward()
        optimizer.step()
    assert model.head_weight.shape[0] == 256
    assert (model.head_weight[211:] == 0).all()
    assert model(some_tokens()).shape[-1] == 211


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_overfits(variant):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"n_layer": 2}, **VARIANTS[variant]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(some_tokens(), some_tokens(seed=1))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def kept_bytes(model, tokens):
    """Count what the forward pass keeps for the backward pass, beside the parameters; and the gradients."""
    kept = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens)
    loss.backward()
    return sum(kept.values()), [parameter.grad for parameter in model.parameters()]


def test_activation_checkpointing_changes_memory_alone():
    tokens = some_tokens(4, 64)
    (kept, gradients), (kept_less, same) = (
        kept_bytes(tiny(activation_checkpointing=on), tokens) for on in (False, True)
    )
    torch.testing.assert_close(same, gradients, rtol=0, atol=0)
    assert kept_less < kept / 3


@pytest.mark.parametrize("in_fp32", [False, True], ids=["", "residual in float32"])
def test_bfloat16_by_autocast_is_within_its_rounding(in_fp32):
    model, tokens = tiny(residual_in_fp32=in_fp32), some_tokens()
    added_to = []
    model.h[-1].register_forward_pre_hook(lambda block, inputs: added_to.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rough, loss = model(tokens), model(tokens, tokens)
    assert rough.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    exact = model(tokens)
    assert added_to == [*[torch.float32 if in_fp32 else torch.bfloat16] * 2, torch.float32]
    assert 0 < (rough.float() - exact).abs().max() / exact.abs().max() < 0.03
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_dropout_is_for_training_alone():
    model, tokens = tiny(dropout=0.5), some_tokens()
    torch.testing.assert_close(model(tokens), tiny()(tokens), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("variant", "autocast"),
    [("gpt2", False), ("gpt2", True), ("modern", True), ("rotary, recomputed", True)],
)
def test_compiled_it_is_one_graph(variant, autocast):
    model, tokens = tiny(n_layer=2, **VARIANTS[variant]), some_tokens()
    torch.compiler.reset()  # it compiles one function only so many times
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = ([run(tokens, tokens), run(tokens)] for run in (compiled, model))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss, _ in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("variant", ["gpt2", "modern"])
def test_compiled_in_parts_all_blocks_share_a_graph_and_the_last_norm_is_in_that_of_the_loss(variant, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    model, tokens = tiny(n_layer=3, **VARIANTS[variant]), some_tokens()
    expected = model(tokens, tokens)
    model.compile_parts()
    torch.testing.assert_close(model(tokens, tokens), expected)
    block, loss = (graph.code for graph in counter.graphs)
    assert "scaled_dot_product_attention" in block
    assert "_norm(" in loss


@pytest.mark.slow
def test_compiled_for_this_machine_it_computes_the_same():
    model, tokens = tiny(), some_tokens()
    loss = torch.compile(model, fullgraph=True)(tokens, tokens)
    gradients = [torch.autograd.grad(result, list(model.parameters())) for result in (loss, model(tokens, tokens))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_head": 5}, "n_head 5 must divide n_embd 48; change one of them"),
        ({"n_head": 16, "position": "rotary"}, "n_embd / n_head must be even, and is 3"),
        ({"dropout": 1.0}, r"dropout must be from 0 to below 1; got 1\.0"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        GPTConfig(**TINY | changes)


def test_an_unknown_preset_is_told_the_nearest():
    with pytest.raises(UserError, match=r"no preset 'gpt2-midium'; did you mean 'gpt2-medium'\? \(there are: gpt2, "):
        preset("gpt2-midium")
    assert preset("gpt2-xl", block_size=4096) == replace(PRESETS["gpt2-xl"], block_size=4096)


def test_more_tokens_than_learned_positions_are_refused():
    with pytest.raises(UserError, match="65 tokens are more than block_size 64, and learned positions end there; give"):
        tiny()(some_tokens(1, 65))
    assert tiny(position="rotary")(some_tokens(1, 65)).shape == (1, 65, 211)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attention_2", "sdpa_flash", "sdpa_cudnn", "auto"])
def test_on_a_gpu_training_in_bfloat16_is_as_exact_as_standard_attention(backend):
    """Compiled and recomputed, by the project's rule: twice the error of standard attention and one rounding."""
    spec = AttentionSpec(2, 1024, 1024, 12, 12, 64, torch.bfloat16, torch.device("cuda"), causal=True, needs_grad=True)
    if backend != "auto" and (reason := why_not(backend, spec)) is not None:
        pytest.skip(reason)
    config = preset("gpt2", n_layer=4, activation_checkpointing=True)
    torch.manual_seed(0)
    model = GPT(config).cuda()
    tokens = some_tokens(2, 1024, 50257).cuda()

    def gradients(backend, compiled=False):
        for block in model.h:
            block.attn.backend = backend
        run = torch.compile(model, fullgraph=True) if compiled else model
        loss = run(tokens, tokens.roll(-1, dims=1))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    exact = gradients("standard")
    with torch.autocast("cuda", torch.bfloat16):
        standard, found = gradients("standard"), gradients(backend, compiled=True)
    for right, rough, result in zip(exact, standard, found, strict=True):
        scale = right.abs().max()
        error, allowed = ((other - right).abs().max() / scale for other in (result, rough))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_on_a_gpu_logits_are_those_of_transformers():
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model, tokens = GPT(preset("gpt2")).eval().cuda(), some_tokens(2, 1024, 50257).cuda()
    theirs = hugging_face(model).cuda()
    with torch.no_grad():
        assert F.l1_loss(model(tokens), theirs(tokens).logits, reduction="none").max() < 1e-4
