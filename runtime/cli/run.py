"""``fusion-run``: ask a bundle questions about an image."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.backends.devices import CANDIDATES
from fusion_edge.runtime.backends.onnxruntime.cpu_kernels import NOT_COMPILED
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.cli.bundle_argument import add_bundle, given_bundle
from fusion_edge.runtime.cli.choices import ChoosingConversation, choice_list
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.model_options import add_deadline_option, add_device_options, load_options
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.cli.stage_display import StageDisplay
from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.conversation import Conversation
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.structured import document, with_grammar
from fusion_edge.runtime.system import signals

if TYPE_CHECKING:
    from fusion_edge.runtime.requests import AnswerOptions

LARGEST_INPUT = 2**21
"""Limit of a history file in bytes and of a question in characters, above the size of any context."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fusion-run`` and return the exit code."""
    return run_command(_run, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Return the command line parser of ``fusion-run``."""
    parser = argparse.ArgumentParser(prog="fusion-run", description="Ask a bundle questions about an image.")
    add = parser.add_argument
    add_bundle(parser)
    add("--image", required=True, metavar="FILE", help="image file")
    add(
        "--ask",
        action="append",
        metavar="TEXT",
        help="question; repeat it to continue the conversation; without it, questions come from standard input",
    )
    add(
        "--choices",
        type=choice_list,
        metavar="LIST",
        help="answer with one of these texts, such as yes,no, and its probability; quote a text that has commas",
    )
    add("--history", type=Path, metavar="FILE", help='earlier turns: a JSON list of {"question", "answer"}')
    add(
        "--query-len",
        type=positive_integer,
        metavar="N",
        help="query length, one that the bundle offers (default: the first)",
    )
    add_deadline_option(parser)
    _add_sampling_options(parser)
    add(
        "--control-tokens",
        action="store_true",
        help="read spellings such as <|end|> in questions and history as control tokens (default: as text)",
    )
    add_device_options(parser)
    add("--json", action="store_true", help="print all answers as one JSON object")
    add(
        "--verbose",
        action="store_true",
        help="print the bundle, the device, and why better ones were skipped, on standard error",
    )
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, Sampling()
    add(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="limit of generated tokens (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: %(default)s)",
    )
    add("--top-p", type=float, default=defaults.top_p, metavar="P", help="nucleus sampling (default: %(default)s, off)")
    add(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="sample from the K likeliest tokens (default: %(default)s, off)",
    )
    add("--seed", type=int, metavar="N", help="random seed, for reproducible sampling")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop string, which ends the answer; repeatable")
    add("--schema", type=Path, metavar="FILE", help="answer with JSON of this JSON schema")
    add("--regex", metavar="PATTERN", help="answer with a text that this regular expression matches")


def _run(arguments: argparse.Namespace) -> int:
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    schema = None if arguments.schema is None else _read_schema(arguments.schema)
    sampling = with_grammar(sampling, schema=schema, regex=arguments.regex)
    if arguments.choices is not None and sampling != Sampling():
        raise UsageError(
            "--choices generates no answer; drop --schema, --regex, --max-new-tokens, --stop and options of sampling."
        )
    if arguments.json and arguments.ask is None:
        raise UsageError("--json needs --ask TEXT; add it, or drop --json.")
    history = [] if arguments.history is None else _read_history(arguments.history)
    source = given_bundle(arguments)
    if arguments.verbose:
        sys.stderr.write(f"bundle: {source}\n")
    with load(Path(source.folder), **load_options(arguments)) as fusion:
        _report_device(fusion, arguments.verbose)
        conversation = fusion.conversation(arguments.image, control_tokens=arguments.control_tokens)
        conversation.history.extend(history)

        if arguments.choices is None:
            options: AnswerOptions = {"sampling": sampling, "query_length": arguments.query_len}
            say, ask = _answering(conversation, arguments.deadline, options, is_document=schema is not None)
        else:
            choosing = ChoosingConversation(conversation, arguments.choices, arguments.deadline, arguments.query_len)
            say, ask = choosing.say, choosing.ask_json
        if arguments.ask is None:
            return _interactive(say)
        if arguments.json:
            sys.stdout.write(json.dumps({"answers": [ask(question) for question in arguments.ask]}) + "\n")
        else:
            for question in arguments.ask:
                say(question)
    return 0


def _report_device(fusion: Fusion, verbose: bool) -> None:
    """Report the choice of the device on standard error, or only what the user can mend: a GPU bundle on the CPU, and
    CPU kernels that are not compiled."""
    device, target = fusion.device, fusion.manifest.target
    reasons = {name: f"not on {name}: {reason}" for name, reason in device.not_taken.items()}
    exported_for = [candidate.name for candidate in CANDIDATES if candidate.target == target]
    if verbose:
        sys.stderr.write("".join(f"{reason}\n" for reason in reasons.values()))
        sys.stderr.write(f"running on {device.name}\n")
        sys.stderr.write(f"CPU kernels: {device.kernels}\n" if device.kernels else "")
        sys.stderr.write(f"note: {device.remark}\n" if device.remark else "")
        return
    if device.remark is not None and device.remark.endswith(NOT_COMPILED):
        sys.stderr.write(f"note: {device.remark}\n")
    if device.name == "cpu" and (skipped := [reasons[name] for name in exported_for if name in reasons]):
        sys.stderr.write(f"warning: running on {device.name}, {' '.join(skipped)}\n")


def _answering(
    conversation: Conversation, deadline: float | None, options: AnswerOptions, is_document: bool
) -> tuple[Callable[[str], None], Callable[[str], dict[str, Any]]]:
    """Return functions of a question: one prints the answer, the other returns it as JSON values."""

    def answer(question: str) -> Answer:
        answer = _ask(conversation, question, deadline, options)
        if is_document:
            document(answer)  # an incomplete one is an error
        return answer

    def say(question: str) -> None:
        if is_document:
            sys.stdout.write(f"{answer(question).text}\n")
            sys.stdout.flush()
        else:
            _say(conversation, question, deadline, options)

    return say, lambda question: _answer_json(answer(question))


def _ask(conversation: Conversation, question: str, deadline: float | None, options: AnswerOptions) -> Answer:
    """Return the answer to a question, and show its stages meanwhile."""
    with StageDisplay() as display:
        return conversation.answer(question, deadline=deadline, on_stage=display.enter, **options)


def _say(conversation: Conversation, question: str, deadline: float | None, options: AnswerOptions) -> None:
    """Print an answer while it is generated, and its stages until then."""
    has_text = False
    try:
        with StageDisplay() as display:
            stream = conversation.stream(question, deadline=deadline, on_stage=display.enter, **options)
            for piece in stream:
                display.hide()
                sys.stdout.write(piece)
                sys.stdout.flush()
                has_text = True
    except (FusionError, KeyboardInterrupt, signals.Terminated):
        if has_text:  # a message follows
            sys.stdout.write("\n")
            sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stream.answer.finish_reason == "deadline":
        sys.stderr.write(f"note: the deadline of {deadline:g} s ended the answer\n")


def _interactive(say: Callable[[str], None]) -> int:
    """Ask the lines of standard input. On a terminal an error or Ctrl-C ends only the answer."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # as Python decodes arguments: an error names the invalid bytes
        sys.stdin.reconfigure(errors="surrogateescape")
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline(LARGEST_INPUT + 1)
        if not line:
            return 0
        if not line.strip():
            continue
        try:
            if len(line) > LARGEST_INPUT:
                raise UsageError(
                    f"A question has more than {LARGEST_INPUT} characters, more than any context; ask a shorter one."
                )
            say(line.strip())
        except FusionError as error:
            if not terminal:
                raise
            sys.stderr.write(f"error: {error}\n")
        except KeyboardInterrupt:  # ends the answer; at the prompt it ends the command
            if not terminal:
                raise
            signals.rearm()
            sys.stderr.write("\n")


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "timings_ms": {stage: round(ms, 3) for stage, ms in answer.timings_ms.items()},
        "tokens_per_second": round(answer.tokens_per_second, 3),
        "logprobs": [round(logprob, 6) for logprob in answer.logprobs],
        "confidence": round(answer.confidence, 6),
    }


def _read_schema(path: Path) -> Grammar:
    try:
        return Grammar.json(read_json(path))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"Cannot read the JSON schema in {path} ({error}); expected a JSON object.") from None


def _read_history(path: Path) -> list[Turn]:
    expected = 'expected a JSON list of {"question": TEXT, "answer": TEXT}'
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_INPUT + 1)
        if len(content) > LARGEST_INPUT:
            raise FusionError(
                f"The history in {path} has more than {LARGEST_INPUT} bytes, more than any context; drop turns."
            )
        data = json.loads(content.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"Cannot read the history in {path} ({error}); {expected}.") from None
    if not isinstance(data, list):
        raise UsageError(f"{path} holds a JSON {type(data).__name__}; {expected}.")
    for entry in data:
        if not (
            isinstance(entry, dict)
            and entry.keys() == {"question", "answer"}
            and all(isinstance(text, str) for text in entry.values())
        ):
            raise UsageError(f"{path} holds the entry {json.dumps(entry)[:80]}; {expected}.")
    return [Turn(**entry) for entry in data]


if __name__ == "__main__":
    sys.exit(main())
