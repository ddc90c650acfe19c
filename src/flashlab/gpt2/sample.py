"""Generation, token by token: the keys and values of past tokens are kept, so that a new one costs one position.

Shapes: B batch, S tokens of the prompts, V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlab.attention import AttentionSpec, resolve
from flashlab.errors import UserError
from flashlab.gpt2.model import GPT, KeyValueCache, check_length

# Backends whose call with a cache reads nothing back from the GPU, as what a CUDA graph holds must not.
_SDPA = ("sdpa_math", "sdpa_efficient", "sdpa_flash", "sdpa_cudnn")
CAPTURABLE = ("standard", *_SDPA, "flash_attention_2", "flash_attention_3")


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue prompts, and hand out each token as soon as it is drawn.

    With the cache and without, the same tokens come out wherever rounding does not decide between two.

    Args:
        model: in evaluation mode, on the device of the tokens.
        tokens: int64 ``[B, S]``, the prompts.
        max_new_tokens: after so many the iterator ends.
        temperature: below 1 prefers likely tokens more, above 1 less; 0 always takes the likeliest.
        top_k: draw from the k likeliest tokens; None from all.
        top_p: draw from the fewest tokens that have this probability together, the likeliest first.
        seed: of the draws.
        stop: a token that ends its sequence, which then repeats it; when all have ended, so does the iterator.
        use_cache: keep keys and values; else every step computes all positions again.

    Returns:
        An iterator of int64 ``[B]``.

    Raises:
        ValueError: the model is in training mode, or the tokens are no ``[B, S]`` with S of 1 or more.
        UserError: an option is out of range, a token is not in the vocabulary, the sequences would outgrow learned
            positions, or the backend cannot run here.
    """
    config = model.config
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [batch, length] of at least one token; got {tuple(tokens.shape)}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more; got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 or more; got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be 1 or more; got {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1; got {top_p}")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= config.vocab_size:
        raise UserError(
            f"token {lowest if lowest < 0 else highest} is not among the model's {config.vocab_size}; "
            "take the tokenizer that the model was trained with"
        )
    check_length(config, tokens.shape[1] + max_new_tokens - 1)  # the last one is drawn, and not read
    generator = torch.Generator(tokens.device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        if temperature < torch.finfo(logits.dtype).tiny:
            return logits.argmax(dim=-1)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # none becomes inf by a small temperature
        probabilities = restrict(logits, top_k, top_p).softmax(dim=-1)
        # As torch.multinomial draws one of them, but for its look at the probabilities, which waits for the GPU.
        waiting = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / waiting).argmax(dim=-1)

    return _generate(model, tokens, max_new_tokens, draw, stop, use_cache)


@torch.no_grad()
def _generate(
    model: GPT, tokens: Tensor, max_new_tokens: int, draw: Callable[[Tensor], Tensor], stop: int | None, use_cache: bool
) -> Iterator[Tensor]:
    batch_size, length = tokens.shape
    cache = None
    if use_cache:
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.wte.weight.dtype
        cache = KeyValueCache(model.config, batch_size, length + max_new_tokens - 1, tokens.device, dtype)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=tokens.device)
    table = model.head_weight.float()  # once: for each token that would be a tensor of a hundred megabytes
    logits = _next_logits(model, table, tokens, cache)
    step = None
    for index in range(max_new_tokens):
        token = draw(logits)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= token == stop
        yield token
        if index + 1 == max_new_tokens or (stop is not None and bool(ended.all())):
            return
        if cache is None:
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            logits = _next_logits(model, table, tokens, None)
        else:
            step = step or _stepper(model, table, cache)
            logits = step(token[:, None])


def _next_logits(model: GPT, table: Tensor, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
    """Return the logits ``[B, V]`` after tokens ``[B, S]``, in float32: in 16 bits the likeliest ones would tie.

    Args:
        model: computes the features.
        table: its `head_weight` in float32.
        tokens: those behind what the cache holds, or all.
        cache: goes on where it ends.
    """
    x = model.features(tokens, cache)[:, -1]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), table)[:, : model.config.vocab_size]


def _stepper(model: GPT, table: Tensor, cache: KeyValueCache) -> Callable[[Tensor], Tensor]:
    """Return what computes the next logits ``[B, V]`` from tokens ``[B, 1]``.

    On a GPU a step of one token takes longer to launch than to compute; a CUDA graph launches it as a whole.
    """
    if not cache.seqlens.is_cuda or _backend_of_step(model, cache) not in CAPTURABLE:
        return lambda token: _next_logits(model, table, token, cache)
    token, seqlens = torch.zeros_like(cache.seqlens, dtype=torch.int64)[:, None], cache.seqlens.clone()
    # The graph must not read casts of the weights that autocast frees when the caller leaves it.
    autocast, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.cuda.device(token.device), torch.autocast("cuda", dtype, enabled=autocast, cache_enabled=False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a first call sets up must not be a part of the graph
            _next_logits(model, table, token, cache)
        torch.cuda.current_stream().wait_stream(stream)
        cache.seqlens.copy_(seqlens)  # the key and the value that it wrote are written over by the next token's
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = _next_logits(model, table, token, cache)

    def replay(new: Tensor) -> Tensor:
        token.copy_(new)
        graph.replay()
        return logits

    return replay


def _backend_of_step(model: GPT, cache: KeyValueCache) -> str:
    keys, _ = cache.layers[0]
    batch_size, places, heads, head_dim = keys.shape
    shape = (batch_size, 1, places, heads, heads, head_dim)
    return resolve(model.config.backend, AttentionSpec(*shape, keys.dtype, keys.device, causal=True, layout="cache"))


def restrict(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Set the logits ``[B, V]`` of tokens that may not be drawn to minus infinity: first by top_k, then by top_p."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability  # the likeliest has 0 before it, so that it always stays
        beyond = (before >= top_p) & (before > 0)  # in float32 a tiny top_p is 0
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits
