"""`megallama generate`, `chat` and `serve`: what needs torch is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megallama.errors import UserError

if TYPE_CHECKING:
    from megallama.generation.sampling import Sampling

RUN = typer.Argument(metavar="RUN", help="A run, one of its checkpoints, or the folder of a Hugging Face Llama.")
DEVICE = typer.Option(help="cpu or cuda; auto: a GPU if there is one.")
DTYPE = typer.Option(help="fp32 or bf16; auto: bf16 on a GPU, fp32 on a CPU.")
TEMPERATURE = typer.Option(help="Divides the logits; lower is less random.", min=0.0, max=1e6)
TOP_K = typer.Option(help="Sample from this many likeliest tokens.", min=1)
TOP_P = typer.Option(help="Sample from the likeliest tokens up to this probability.", min=0.0, max=1.0)
MIN_P = typer.Option(help="Sample from tokens of at least this part of the likeliest one's probability.", min=0, max=1)
PENALTY = typer.Option(help="Above 1, tokens that are in the text become less likely.", min=1e-3, max=1e3)
GREEDY = typer.Option("--greedy", help="Always take the likeliest token.")
AVERAGE = typer.Option("--average", help="Take the average of the weights that train.average saves.")
SEED = typer.Option(help="Random seed.", min=0, max=2**63 - 1)


def generate(
    path: Annotated[Path, RUN],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File that holds the text to continue, in UTF-8.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to add.", min=1)] = 128,
    temperature: Annotated[float, TEMPERATURE] = 0.8,
    top_k: Annotated[int | None, TOP_K] = None,
    top_p: Annotated[float | None, TOP_P] = None,
    min_p: Annotated[float | None, MIN_P] = None,
    repetition_penalty: Annotated[float, PENALTY] = 1.0,
    greedy: Annotated[bool, GREEDY] = False,
    seed: Annotated[int, SEED] = 0,
    samples: Annotated[int, typer.Option(help="Texts to write; each has a seed of its own.", min=1, max=10_000)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends what is written; may be repeated.")] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    average: Annotated[bool, AVERAGE] = False,
) -> None:
    """Continue a prompt with the newest checkpoint of a run.

    Example: megallama generate runs/quickstart --prompt "def main(" --top-p 0.9 --seed 7
    """
    from megallama.generation.generate import write
    from megallama.generation.load import load_here
    from megallama.text.surrogates import without_surrogates

    text = _prompt(prompt, prompt_file)
    with load_here(path, device, dtype, average=average) as (loaded, first):
        sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed)
        told = typer.echo if first else _silence
        head, written = without_surrogates(text), [""] * samples
        if samples == 1:
            told(head, nl=False)
        for piece in write(loaded, [text], max_tokens, sampling, stop=stop or (), samples=samples):
            written[piece.sample] += piece.text
            if samples == 1:
                told(piece.text, nl=False)
        for number, each in enumerate(written):
            told("" if samples == 1 else f"--- sample {number + 1}, seed {seed + number}\n{head}{each}")


def chat(
    path: Annotated[Path, RUN],
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of an answer.", min=1)] = 256,
    temperature: Annotated[float, TEMPERATURE] = 0.8,
    top_k: Annotated[int | None, TOP_K] = None,
    top_p: Annotated[float | None, TOP_P] = None,
    min_p: Annotated[float | None, MIN_P] = None,
    repetition_penalty: Annotated[float, PENALTY] = 1.0,
    greedy: Annotated[bool, GREEDY] = False,
    seed: Annotated[int, SEED] = 0,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    average: Annotated[bool, AVERAGE] = False,
) -> None:
    """Talk to a model: it continues a transcript of "User:" and "Assistant:". Ctrl-C ends an answer, Ctrl-D the chat.

    Example: megallama chat runs/quickstart --temperature 0.7
    """
    from megallama.generation.chat import talk
    from megallama.generation.load import load_alone

    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed)
    talk(load_alone(path, device, dtype, average=average), max_tokens, sampling)


def serve(
    path: Annotated[Path, RUN],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    max_prompt: Annotated[int | None, typer.Option(help="Most tokens of a prompt. Default: the window.", min=1)] = None,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait for their turn.", min=1)] = 256,
    max_batch: Annotated[int, typer.Option(help="Texts that are written at once.", min=1, max=4096)] = 32,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    average: Annotated[bool, AVERAGE] = False,
) -> None:
    """Answer OpenAI's completions and chat completions over HTTP, on this machine unless --host says otherwise.

    Example: megallama serve runs/quickstart --port 8000
    """
    try:
        from megallama.generation.server import serve_forever
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"megallama serve needs {error.name}; pip install 'megallama[serve]'") from None
    from megallama.generation.load import load_alone
    from megallama.generation.server import listen

    with listen(host, port) as door:  # a port that is taken is told before the model is read
        serve_forever(load_alone(path, device, dtype, average=average), door, max_prompt, max_waiting, max_batch)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if file is None:
        return prompt or ""
    if prompt is not None:
        raise UserError("--prompt and --prompt-file are both given; leave one out")
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {file} cannot be read as UTF-8 ({error}); give another file") from None


def _sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    greedy: bool,
    seed: int,
) -> Sampling:
    from megallama.generation.sampling import Sampling

    return Sampling(0.0 if greedy else temperature, top_k, top_p, seed, min_p, repetition_penalty)


def _silence(_: object, nl: bool = True) -> None:
    """What ranks but the first print."""
