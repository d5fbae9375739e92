"""The command line: `softprompt train | sweep | generate | eval | serve | show | convert | compare | check | methods`.

Whatever a user can cause ends with one line on stderr that names the cause and the remedy, and exit status 2; an
interrupt ends with 130. Any other exception is a bug, and shows its traceback.
"""

import errno
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from softprompt.cli.flags import (
    RECIPE_OPTIONS,
    check_options,
    method_parameters,
    recipe_parameters,
    split_given,
    with_parameters,
)
from softprompt.cli.serve import options_of, serve_parameters
from softprompt.cli.sweep import sweep_parameters
from softprompt.errors import ConfigError, RunInterrupted, SoftPromptError

app = typer.Typer(
    help="Soft prompts over frozen Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# typer carries a click of its own in newer versions, so its exceptions are reached through typer
ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # pyright: ignore[reportAssignmentType]

REMEDIES = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some of your quota or write to another disk",
    errno.EACCES: "choose a place you may read and write",
    errno.EPERM: "choose a place you may read and write",
    errno.EROFS: "choose a place that is not read-only",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "choose a path on which every part but the last is a folder",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "choose another path",
}

Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Base model: a folder or hub name. [default: as trained, else the one in the package]"
    ),
]
Prompt = Annotated[Path, typer.Option("--prompt", help="Folder of the saved prompt.")]
TemplateFlag = Annotated[str | None, typer.Option("--template", help="Template of the input. [default: as trained]")]
OneTask = Annotated[str | None, typer.Option("--task", help="Which task, by name or number, of a prompt of several.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, … or auto.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Number format of the base model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows per batch.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. `arguments` default to the process's own."""
    _prepare()
    try:
        status = app(args=arguments, prog_name="softprompt", standalone_mode=False)
    except RunInterrupted as error:
        return _fail(str(error), status=130)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except SoftPromptError as error:
        return _fail(str(error))
    except ClickException as error:
        message = _usage_message(error)
        return _fail(message) if message else 2  # without any arguments the help has been printed
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        return _fail(_os_message(error))
    except MemoryError:
        return _fail("there is not enough memory; use a smaller --batch-size or a smaller model")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return _fail("there is not enough memory; use a smaller --batch-size or a smaller model")
    if status == 130:  # typer turns Ctrl-C into this status, in some versions without a word
        return _fail("interrupted", status)
    return status if isinstance(status, int) else 0


def _prepare() -> None:
    """Progress bars and remarks of transformers belong to neither our output nor our errors.

    A terminal that cannot show a character gets a question mark in its place.
    """
    from transformers.utils import logging

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _fail(message: str, status: int = 2) -> int:
    line = " ".join(message.split())  # and nothing from a file may reach the terminal as a control character
    typer.echo(f"error: {''.join(char if char.isprintable() else '?' for char in line)}", err=True)
    return status


def _usage_message(error: Any) -> str:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if message and context else message


def _os_message(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "check the path and the disk")
    return f"{place}{error.strerror or error}; {remedy}"


@app.callback(invoke_without_command=True)
def _version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if show_version:
        from softprompt import __version__

        typer.echo(f"softprompt {__version__}")
        raise typer.Exit


@app.command()
@with_parameters([*recipe_parameters(), *method_parameters()])
def train(
    recipe: Annotated[str | None, typer.Argument(help="Recipe in YAML; flags win over it.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    verbalizer: Annotated[
        str | None, typer.Option("--verbalizer", help="CLOZE: the labels' words, as label=word,label=word|other word.")
    ] = None,
    **given: Any,
) -> None:
    """Train a prompt on a frozen model: a recipe, flags, or both."""
    from softprompt.cli.output import print_result
    from softprompt.train import train as run

    if verbalizer is not None:
        from softprompt.cloze.verbalizer import Verbalizer

        given["verbalizer"] = {label: list(words) for label, words in Verbalizer.parse(verbalizer).words.items()}
    settings = build_recipe(recipe, resume, given)
    result = run(settings, resume=resume)
    if result.rank == 0:
        print_result(Console(), result)


@app.command()
@with_parameters([*sweep_parameters(), *recipe_parameters(), *method_parameters()])
def sweep(
    recipe: Annotated[str, typer.Argument(help="Recipe in YAML with a `sweep` block; flags win over the rest of it.")],
    **given: Any,
) -> None:
    """Train a prompt for each of many settings, and compare them: a table and a page in --out."""
    from softprompt.cli.sweep import sweep as run

    run(recipe, given)


def build_recipe(path: str | None, resume: bool, given: dict[str, Any]) -> Any:
    """The recipe file (of the run itself, to resume without one) with the given flags over it."""
    from softprompt.recipe import Recipe, read_yaml
    from softprompt.recipe.auto import method_of
    from softprompt.train.run_folder import RECIPE

    settings, options = split_given(given)
    out = settings.get("out")
    if path is None and resume and out and (Path(out) / RECIPE).is_file():
        path = str(Path(out) / RECIPE)
    elif path is None and resume and out and not settings.get("train"):
        raise ConfigError(
            f"there is no run in {out} to go on with; to begin one there, say what it trains on (--train)"
        )
    values = read_yaml(path) if path else {}
    if "steps" in settings:
        values.pop("epochs", None)
    if "epochs" in settings:
        values.pop("steps", None)
    stored = values.get(RECIPE_OPTIONS) or {}
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: {RECIPE_OPTIONS} is {stored!r}; it must be a mapping of names to values")
    recipe = Recipe.from_dict(
        {**values, **settings, RECIPE_OPTIONS: {**stored, **options}}, where=path or "the command"
    )
    check_options(method_of(recipe), options)
    return recipe


@app.command()
def generate(
    prompt: Prompt,
    model: Model = None,
    text: Annotated[str | None, typer.Option("--input", help="One input.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="Inputs: .txt by line, .jsonl, .csv or .parquet.")] = None,
    template: TemplateFlag = None,
    column: Annotated[str | None, typer.Option("--input-column", help="Column of the input, without template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use texts as they are, without the run's template.")] = False,
    task: OneTask = None,
    max_new_tokens: NewTokens = 64,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Beams of the search; 1 is greedy.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=1e-6, help="Of --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=1e-6, max=1.0, help="Of --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Of --sample; 0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", min=1e-6, help="1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --sample.")] = 0,
    batch_size: BatchSize = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per input.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Answer without the prompt, to compare.")] = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Complete one input, or every input of a file, one completion per line."""
    from softprompt.cli.prompted import example_of, examples_of, open_prompted, read_saved
    from softprompt.cli.use import Decoding, answers, cloze_answers, print_answers

    if (text is None) == (file is None):
        raise ConfigError("give one input by --input TEXT, or many by --file FILE")
    read_saved(prompt)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k} if sample else {}
    decoding = Decoding(max_new_tokens, batch_size, seed, {"num_beams": num_beams, **sampling}
                        | ({"repetition_penalty": repetition_penalty} if repetition_penalty != 1 else {}))  # fmt: skip
    opened = open_prompted(prompt, model, dtype, device, template, task)
    if opened.cloze is not None:
        print_answers(*cloze_answers(opened, text, file, batch_size, frozen), as_json, one_per_line=file is not None)
        return
    used = None if raw else opened.template
    column = column or (opened.recipe.input_column if opened.recipe else None)
    inputs = [example_of(text, used)] if text is not None else examples_of(str(file), used, column)
    stream = text is not None and not as_json and num_beams == 1 and sys.stdout.isatty()
    texts = answers(opened, inputs, decoding, stream=stream, frozen=frozen)
    if not stream:
        print_answers(inputs, texts, as_json=as_json, one_per_line=file is not None)


@app.command("eval")
def evaluate(
    prompt: Prompt,
    data: Annotated[str, typer.Option("--eval", help="Held-out data, in the form of the training data.")],
    model: Model = None,
    template: TemplateFlag = None,
    input_column: Annotated[str | None, typer.Option("--input-column", help="[default: as trained]")] = None,
    target_column: Annotated[str | None, typer.Option("--target-column", help="[default: as trained]")] = None,
    split: Annotated[str, typer.Option("--split", help="Of a named data set.")] = "validation",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N rows.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Rows where COLUMN=VALUE. [default: as trained]")] = None,
    task: OneTask = None,
    max_new_tokens: NewTokens = 64,
    batch_size: BatchSize = 32,
    frozen: Annotated[bool, typer.Option("--frozen/--no-frozen", help="Measure the bare model beside it.")] = True,
    as_json: AsJson = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Measure a prompt on held-out data: loss, BLEU and chrF, accuracy, or P@1; the frozen model beside it."""
    from softprompt.cli.output import print_scores
    from softprompt.cli.prompted import open_prompted
    from softprompt.cli.use import EvalSettings, measure

    settings = EvalSettings(
        data, template, input_column, target_column, split, limit, max_new_tokens, batch_size, only, task
    )
    scores = measure(lambda: open_prompted(prompt, model, dtype, device, template, task), prompt, settings, frozen)
    if as_json:
        typer.echo(json.dumps(scores))
    else:
        print_scores(Console(), scores)


@app.command(context_settings={"allow_extra_args": True})
@with_parameters(serve_parameters())
def serve(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Base model: a folder or hub name.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="Folder of saved prompts, called by their paths.")],
    **given: Any,
) -> None:
    """Serve the prompts of a folder through the OpenAI API. What stands after -- goes to `vllm serve`."""
    from softprompt.serve import serve as run

    run(options_of(base, prompts, given), context.args)


@app.command()
def show(
    prompt: Annotated[Path, typer.Argument(help="Folder of a saved prompt, or a key-value file.")],
    model: Model = None,
    nearest: Annotated[int, typer.Option("--nearest", min=0, help="Nearest vocabulary tokens per virtual token.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what a prompt is: method, size, base model, norms, and the tokens nearest to it."""
    from softprompt.cli.output import print_facts
    from softprompt.cli.use import facts_of

    facts, note = facts_of(prompt, model, nearest)
    if as_json:
        typer.echo(json.dumps(facts.to_dict(), ensure_ascii=False))
    else:
        print_facts(Console(), prompt, facts, note)


@app.command()
def convert(
    prompt: Annotated[Path, typer.Argument(help="Folder of a saved prompt, ours or PEFT's.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="kv (one file), prefix (PEFT prefix tuning), peft (safetensors), prompt_tuning (one task of several), "
            "mlx (mlx-lm prompt cache).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File (kv, mlx) or folder to write.")],
    model: Model = None,
    task: OneTask = None,
) -> None:
    """Convert a prompt: any front prompt to keys and values, one task of several, old PEFT files to safetensors."""
    from softprompt.cli.use import convert_prompt

    typer.echo(convert_prompt(prompt, to, out, model, task))


@app.command()
def compare(
    prompts: Annotated[list[Path], typer.Argument(help="Folders of saved prompts, two or more.")],
    metric: Annotated[
        str, typer.Option("--metric", help="average (of the prompts' mean tokens) or per-token (mean over all pairs).")
    ] = "average",
    as_json: AsJson = False,
) -> None:
    """Compare prompts of several tasks: the cosine between each two, from −1 to 1."""
    from softprompt.cli.output import print_comparison
    from softprompt.together.compare import compare_prompts

    comparison = compare_prompts(prompts, metric)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), ensure_ascii=False))
    else:
        print_comparison(Console(), comparison)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Base model: a folder or hub name.")],
    method: Annotated[str | None, typer.Option("--method", help="One method. [default: all]")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """What was found out about a model, and whether prompts on it do what the same tokens in the row do."""
    from softprompt.checking import check as run
    from softprompt.loading import load_any

    report = run(load_any(model, dtype, device), method)
    typer.echo(report.to_json() if as_json else str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """List the methods with their papers and flags."""
    from softprompt.cli.output import print_methods

    print_methods(Console())
