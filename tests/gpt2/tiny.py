"""Small models for tests."""

import torch

from flashlab.attention import AttentionSpec
from flashlab.attention.backends import BACKENDS
from flashlab.gpt2.config import GPTConfig
from flashlab.gpt2.model import GPT

ON_CPU = AttentionSpec(2, 48, 48, 4, 4, 12, torch.float32, torch.device("cpu"), causal=True, needs_grad=True)
CPU_BACKENDS = [name for name, backend in BACKENDS.items() if backend.why_not(ON_CPU) is None]
TINY = {"n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 64, "vocab_size": 211}
UNLIKE_GPT2 = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tie_weights": False}


def tiny(**changes) -> GPT:
    """A small GPT-2 with weights as if it had learned something, of which not one is a plain number."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (0.1 if parameter.dim() == 2 else 0.3)
            if name in ("wte.weight", "lm_head.weight"):
                noise[model.config.vocab_size :] = 0
            parameter += noise
    return model.eval()


def some_tokens(batch=2, length=48, vocab_size=211, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
