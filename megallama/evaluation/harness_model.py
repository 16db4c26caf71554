"""A model as lm-evaluation-harness asks it: how likely a text is, and what is written after one."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from rich.console import Console
from rich.progress import track

from megallama.config.schema import IGNORE_INDEX
from megallama.errors import UserError
from megallama.evaluation.score import beginning
from megallama.evaluation.windows import Window, stacked, windows
from megallama.generation.generate import not_finite, write
from megallama.generation.load import load_alone
from megallama.generation.sampling import Sampling

Answer = tuple[float, bool]
"""The log-probability of a text, in nats, and whether each of its tokens is the likeliest."""
Pair = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation; the ids of each."""
_THEIR_DEVICE = "cuda:0"
"""What lm_eval gives where nobody asks for a device; its `hf` then takes the CPU of a machine without a GPU."""
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = {*_DRAWS, "do_sample", "until", "max_gen_toks"}
_WITHOUT_EFFECT = [("num_beams", 1), ("top_k", 0)]
"""What tasks write out that is so anyway."""


class Megallama(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A run, a checkpoint or a Hugging Face folder, as lm_eval asks it. Texts are cut into tokens as lm_eval's `hf`
    cuts them."""

    def __init__(
        self,
        run: object = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: object = 1,
        average: object = False,
        **unknown: object,
    ) -> None:
        """What `--model_args` may hold; lm_eval gives its own `--batch_size` and `--device` the same way.

        UserError for a run that is not there, and for what is not known here.
        """
        super().__init__()
        if unknown:
            known = "run, device, dtype, batch_size, average"
            raise UserError(f"--model_args {next(iter(unknown))}= is not known; use {known}")
        if run is None:
            raise UserError("--model_args names no run; give run=RUN, a run, a checkpoint or a Hugging Face folder")
        if not str(batch_size).isdecimal() or int(str(batch_size)) < 1:
            raise UserError(f"--batch_size {batch_size} is not known; give a number such as 8")
        self.batch_size = int(str(batch_size))
        if str(average).lower() not in ("true", "false"):
            raise UserError(f"--model_args average={average} is not known; use true or false")
        self.loaded = load_alone(Path(str(run)), device or "auto", dtype, average=str(average).lower() == "true")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Megallama:
        """With what lm_eval gives unasked, batch size 1 and a GPU that may not be there; `--model_args` come first."""
        given = {key: value for key, value in (additional_config or {}).items() if value not in (None, _THEIR_DEVICE)}
        return cls(**{**given, **arg_dict})

    @property
    def max_length(self) -> int:
        """The window of the model, in tokens."""
        return self.loaded.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self.loaded.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context stands behind."""
        return beginning(self.loaded)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The ids of a text behind what its tokenizer begins every text with, unless that is not wanted."""
        prefix = () if add_special_tokens is False else self.loaded.prefix
        return [*prefix, *self.loaded.tokenizer.encode(string)]

    def apply_chat_template(self, chat_history: object, add_generation_prompt: bool = True) -> str:
        """UserError: there is none."""
        raise UserError("--apply_chat_template, but the model has no chat template; leave it out")

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: object) -> list[Answer]:
        """Of each continuation behind its context, of which the beginning goes where the window has no room for it."""
        cut = [self._window(*request) for request in requests]
        found: dict[int, Answer] = {}
        for place, answer in self._answers(cut):
            found[place] = answer
            self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
        return [found[place] for place in range(len(requests))]

    def _window(self, texts: tuple[str, str], context: Sequence[int], continuation: Sequence[int]) -> Window:
        count = len(continuation)
        if not 0 < count <= self.max_length:
            raise UserError(
                f"the continuation {texts[1][:40]!r} has {count} tokens of its own, and must have 1 to "
                f"{self.max_length}, the model's window; change the task"
            )
        ids = [*(context or [self.prefix_token_id]), *continuation]
        return Window(tuple(ids[-(self.max_length + 1) :]), count)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that are full but for the first of a short text: each token counts once."""
        cut, owners = list[Window](), list[int]()
        for number, request in enumerate(requests):
            ids = [self.prefix_token_id, *self.loaded.tokenizer.encode(request.args[0])]
            new = list(windows(ids, self.max_length, self.max_length))
            cut += new
            owners += [number] * len(new)
        totals = [0.0] * len(requests)
        for place, (logprob, _) in self._answers(cut):
            totals[owners[place]] += logprob
        return totals

    def _answers(self, cut: Sequence[Window]) -> Iterator[tuple[int, Answer]]:
        """The place of each window and its answer; the longest first, so that too large a batch fails at once."""
        order = sorted(range(len(cut)), key=lambda place: -len(cut[place].tokens))
        starts = range(0, len(order), self.batch_size)
        for start in track(starts, "log-likelihoods", console=Console(stderr=True)):
            places = order[start : start + self.batch_size]
            yield from zip(places, self._score([cut[place] for place in places]), strict=True)

    @torch.inference_mode()
    def _score(self, batch: Sequence[Window]) -> list[Answer]:
        tokens, labels = (each.to(self.loaded.device) for each in stacked(batch))
        answers = []
        for row, wanted in zip(self.loaded.model(tokens), labels, strict=True):
            counted = wanted != IGNORE_INDEX
            logits, target = row[counted].float(), wanted[counted]
            logprob = float(logits.log_softmax(-1).gather(-1, target[:, None]).sum(dtype=torch.float64))
            if not math.isfinite(logprob):
                raise UserError(not_finite(self.loaded))
            answers.append((logprob, bool((logits.argmax(-1) == target).all())))
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to a stop string; what lm_eval asks for again has another seed."""
        groups, asked = defaultdict[tuple[str, int], list[int]](list), Counter[str]()
        for place, request in enumerate(requests):
            context, arguments = request.args
            key = json.dumps(arguments, sort_keys=True)
            groups[key, asked[key + context]].append(place)
            asked[key + context] += 1
        texts = [""] * len(requests)
        groups_shown = track(groups.items(), "texts", console=Console(stderr=True))
        for (key, again), places in groups_shown:
            arguments = normalize_gen_kwargs(json.loads(key), default_max_gen_toks=256)
            sampling = _sampling(arguments, torch.initial_seed() + again)
            prompts = [requests[place].args[0] for place in places]
            limit, stop = arguments["max_gen_toks"], arguments["until"]
            for piece in write(self.loaded, prompts, limit, sampling, stop=stop, rows=self.batch_size):
                place = places[piece.prompt]
                texts[place] += piece.text
                if piece.ended:
                    self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts


def _sampling(arguments: Mapping[str, Any], seed: int) -> Sampling:
    """As the task asks: greedy unless it has a temperature. UserError for an argument that is not known here."""
    asked = {key: value for key, value in arguments.items() if (key, value) not in _WITHOUT_EFFECT}
    if unknown := sorted(asked.keys() - _KNOWN):
        raise UserError(f"the generation argument {unknown[0]} is not known; use {', '.join(sorted(_KNOWN))}")
    return Sampling(seed=seed, **{"temperature": 0.0} | {key: asked[key] for key in _DRAWS if key in asked})
