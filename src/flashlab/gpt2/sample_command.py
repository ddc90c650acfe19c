"""`flashlab gpt2 sample` and `flashlab gpt2 export`: what a trained model writes, and its weights in another format."""

import codecs
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jsonargparse.typing import PositiveInt, restricted_number_type
from rich.console import Console
from rich.progress import track

from flashlab.errors import UserError, enough_memory, print_now, write_text
from flashlab.gpt2 import huggingface
from flashlab.gpt2.model import GPT, CausalSelfAttention
from flashlab.gpt2.module import load_gpt
from flashlab.gpt2.sample import generate
from flashlab.gpt2.tokenizer import PAIRS, VOCABULARY, BytePairTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from flashlab.training.callbacks import BEST

if TYPE_CHECKING:
    DrawSeed = int
else:
    DrawSeed = restricted_number_type("DrawSeed", int, [(">=", 0), ("<", 2**63)])

STANDARD_INPUT = Path("-")
MOST_NEW_TOKENS = 512  # unless more are asked for


def sample(
    run: Path,
    *,
    prompt: str = "",
    prompt_file: Path | None = None,
    max_new_tokens: PositiveInt | None = None,
    num_samples: PositiveInt = 1,
    temperature: float = 1.0,
    top_k: PositiveInt | None = None,
    top_p: float = 1.0,
    seed: DrawSeed = 0,
    checkpoint: str = BEST,
    backend: str = "auto",
    vocabulary: Path | None = None,
) -> int:
    """Have a trained GPT-2 continue a text, printed as it comes.

    A text ends where the model ends it, or after max_new_tokens.

    Args:
        run: folder of a run, or one in Hugging Face's format (config.json and model.safetensors).
        prompt: the text to continue; without one the model begins a text of its own.
        prompt_file: file with the text to continue; - reads it from standard input.
        max_new_tokens: by default as many as fit into block_size behind the prompt, 512 at most.
        num_samples: how many continuations; several are drawn side by side and printed one after the other.
        temperature: below 1 prefers likely tokens more, above 1 less; 0 always takes the likeliest.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest tokens that have this probability together.
        seed: of the draws.
        checkpoint: file under RUN/checkpoints.
        backend: attention backend; auto takes the best that can run.
        vocabulary: of a folder in Hugging Face's format: a folder with vocab.bpe and encoder.json (merges.txt and
            vocab.json), or a .tiktoken file; by default the folder's own, or if it has none GPT-2's, downloaded once.

    Raises:
        UserError: there is no such run or checkpoint, the prompt cannot be read or is too long, an option is out of
            range, or the backend cannot run here.
    """
    text = _read_prompt(prompt, prompt_file)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal's encoding has no word for
    with enough_memory("free some, or ask for fewer or shorter samples"):
        model, tokenizer = load_model(run, checkpoint, vocabulary)
        on_gpu = torch.cuda.is_available()
        rough = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        model.to(device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16 if rough else torch.float32).eval()
        use_backend(model, backend)
        encoded = tokenizer.encode(text).tolist() or [tokenizer.end_of_text]
        room = model.config.block_size - len(encoded) + 1  # the last token is drawn, and not read
        if max_new_tokens is None and room < 1:
            beyond = ", or --max_new_tokens to go beyond" if model.config.position == "rotary" else ""
            raise UserError(
                f"the prompt has {len(encoded):,} tokens, and block_size is {model.config.block_size:,}; "
                f"give a shorter one{beyond}"
            )
        count = max_new_tokens or min(room, MOST_NEW_TOKENS)
        tokens = torch.tensor([encoded] * num_samples, device=model.wte.weight.device)
        drawn = generate(
            model,
            tokens,
            count,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tokenizer.end_of_text,
        )
        if num_samples == 1:
            texts: list[Iterator[str]] = [_decoded(tokenizer, (int(token) for token in drawn))]
        else:
            console = Console(stderr=True)
            rows = torch.stack(list(track(drawn, "sample", total=count, console=console, transient=True))).T.tolist()
            texts = [_decoded(tokenizer, row) for row in rows]
        for number, pieces in enumerate(texts, 1):
            title = f"--- {number} of {num_samples}\n" if num_samples > 1 else ""
            if not _print_all(title + text, pieces):
                return 128 + signal.SIGPIPE
    return 0


def export(run: Path, *, out: Path, checkpoint: str = BEST) -> None:
    """Write a trained model in Hugging Face's GPT-2 format, for transformers and `flashlab gpt2 sample`.

    Args:
        run: folder of the run.
        out: folder that gets config.json, model.safetensors and, of the tokenizer gpt2, vocabulary.tiktoken.
        checkpoint: file under RUN/checkpoints.

    Raises:
        UserError: there is no such run or checkpoint, the format has no word for the model (rotary positions, RMSNorm,
            SwiGLU), the folder holds something else, or it cannot be written.
    """
    _require_folder(run)
    if out.is_dir() and any(out.iterdir()) and not (out / huggingface.CONFIG).is_file():  # a run would be taken for one
        raise UserError(f"--out {out} holds something other than an exported model; name another folder")
    model, tokenizer = load_gpt(run, checkpoint)
    huggingface.save(model, out)
    if isinstance(tokenizer, BytePairTokenizer):
        write_text(out / VOCABULARY, tokenizer.to_tiktoken().decode())
    print(f"wrote {out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:,.1f} MB")


def load_model(run: Path, checkpoint: str = BEST, vocabulary: Path | None = None) -> tuple[GPT, Tokenizer]:
    """Load a model with its tokenizer from a run, or from a folder in Hugging Face's format.

    Raises:
        UserError: neither is there, it is damaged, or the vocabulary is another one.
    """
    _require_folder(run)
    if not (run / huggingface.CONFIG).is_file():
        if vocabulary is not None:
            raise UserError("--vocabulary is for a folder in Hugging Face's format: a run has its tokenizer")
        return load_gpt(run, checkpoint)
    if checkpoint != BEST:
        raise UserError(f"--checkpoint {checkpoint} is for a run: {run} is in Hugging Face's format")
    model = GPT(huggingface.read_config(run))
    if model.config.vocab_size == ByteTokenizer().vocab_size:
        tokenizer = load_tokenizer("bytes", vocabulary)
    else:
        tokenizer = load_tokenizer("gpt2", vocabulary or _vocabulary_in(run))
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{run} has {model.config.vocab_size:,} tokens, and the vocabulary {tokenizer.vocab_size:,}; name its own "
            "with --vocabulary"
        )
    huggingface.load(model, run)
    return model, tokenizer


def _require_folder(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"{run}: there is no such folder; name a run, or a folder in Hugging Face's format")


def use_backend(model: GPT, backend: str) -> None:
    """Have a model compute attention by another backend than it was trained with."""
    model.config = replace(model.config, backend=backend)
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.backend = backend


def _vocabulary_in(folder: Path) -> Path | None:
    if (folder / VOCABULARY).is_file():
        return folder / VOCABULARY
    return folder if any(all((folder / name).is_file() for name in pair) for pair in PAIRS) else None


def _read_prompt(prompt: str, file: Path | None) -> str:
    if prompt and file is not None:
        raise UserError("--prompt and --prompt_file are two prompts; give one")
    if file == STANDARD_INPUT and sys.stdin is None:
        raise UserError("standard input is closed; pipe a text into it, or name a file")
    name = "--prompt" if file is None else f"--prompt_file {file}"
    try:
        if file is None:
            return os.fsencode(prompt).decode()
        return (sys.stdin.buffer.read() if file == STANDARD_INPUT else file.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 at byte {error.start:,}; convert it") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; check the path and its permissions") from error


def _decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Turn tokens into text as they come, up to the end of text; a character is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in takewhile(lambda token: token != tokenizer.end_of_text, tokens):
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def _print_all(first: str, pieces: Iterator[str]) -> bool:
    """Print pieces at once as they come, and a line end behind them; say whether somebody still reads."""
    first += next(pieces)  # what cannot be computed here says so before anything is printed
    try:
        return all(print_now(piece, end="") for piece in chain([first], pieces))
    finally:
        print_now("")
