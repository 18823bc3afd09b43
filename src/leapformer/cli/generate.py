"""``leapformer generate``."""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from transformers import TextStreamer

from leapformer.cli.train import use_threads
from leapformer.errors import LeapformerError
from leapformer.training.loading import load_with_tokenizer
from leapformer.training.run import Run


def generate_text(
    folder: Path, prompt: str, *, tokens: int, temperature: float, top_p: float, seed: int, threads: int | None
) -> None:
    """Stream the prompt and its continuation to the terminal."""
    use_threads(threads)
    run = Run(folder)
    run.recipe()
    model, tokenizer = load_with_tokenizer(run.model_path)
    text = continue_text(
        model, tokenizer, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),  # type: ignore[arg-type]
    )  # fmt: skip
    if not text:
        typer.echo("(the model ended the text at once)")


def continue_text(
    model, tokenizer, prompt: str, *, tokens: int, temperature: float, top_p: float, seed: int, streamer=None
) -> str:
    """What the model writes after the prompt; the global random state is left as it was."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise LeapformerError("prompt: expected at least one token, found an empty text")
    limit = model.config.length_limit()
    length = inputs["input_ids"].shape[1]
    if limit is not None and length + tokens - 1 > limit[0]:  # the last token is written, but never read
        raise LeapformerError(
            f"prompt: expected at most max_position_embeddings={limit[0]} tokens with those to write, "
            f"found {length} and {tokens} to write; {limit[1]}"
        )
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, max_new_tokens=tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, **drawing,
        )  # fmt: skip
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
