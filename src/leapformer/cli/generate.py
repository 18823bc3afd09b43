"""``leapformer generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from leapformer.cli.late import needs
from leapformer.cli.options import MOST_SEED, MOST_TOKENS, RunFolder, Threads, a_text, finite, use_threads
from leapformer.errors import LeapformerError


def a_temperature(number: float) -> float:
    """A temperature that logits can be divided by."""
    if not (number == 0 or 1e-3 <= number <= 1e3):
        raise typer.BadParameter(f"expected 0, or a number from 0.001 to 1,000, found {number:g}")
    return number


@dataclass(frozen=True)
class Sampling:
    """How a text goes on: how many tokens at most, and how they are drawn. The temperature 0 takes the likeliest."""

    tokens: int
    temperature: float
    top_p: float
    seed: int


@needs("lm", "torch", "transformers", "leapformer.training.loading", "leapformer.training.run")
def generate(
    folder: RunFolder,
    prompt: Annotated[str, typer.Argument(parser=a_text, metavar="PROMPT", help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="How many tokens to write at most.")] = 200,
    temperature: Annotated[
        float,
        typer.Option(callback=a_temperature, help="From 0.001 to 1,000, or 0, which always takes the likeliest token."),
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="Share of probability to draw from.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the random draws.")] = 0,
    threads: Threads = None,
) -> None:
    """Go on from a prompt; words appear as they are written."""
    from transformers import TextStreamer

    from leapformer.training.loading import load_with_tokenizer
    from leapformer.training.run import Run

    use_threads(threads)
    run = Run(folder)
    run.recipe()
    model, tokenizer = load_with_tokenizer(run.model_path)
    sampling = Sampling(tokens, temperature, top_p, seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    if not continue_text(model, tokenizer, prompt, sampling, streamer=streamer):
        typer.echo("(the model ended the text at once)")


def continue_text(model: Any, tokenizer: Any, prompt: str, sampling: Sampling, *, streamer: Any = None) -> str:
    """What the model writes after the prompt; the global random state is left as it was."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise LeapformerError("prompt: expected at least one token, found an empty text")
    limit = model.config.length_limit()
    length = inputs["input_ids"].shape[1]
    if limit is not None and length + sampling.tokens - 1 > limit[0]:  # the last token is written, but never read
        raise LeapformerError(
            f"prompt: expected at most max_position_embeddings={limit[0]} tokens with those to write, "
            f"found {length} and {sampling.tokens} to write; {limit[1]}"
        )
    drawing: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        drawing |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sampling.seed)
        output = model.generate(**inputs, **ids, **drawing, max_new_tokens=sampling.tokens, streamer=streamer)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
