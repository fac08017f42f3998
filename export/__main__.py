"""`python -m export`: checkpoint -> verified bundle."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from export.architectures import ARCHITECTURES, KNOWN_MODELS
from serving.bundle import TOWERS, Bundle
from serving.commands import DefaultCommandGroup, Json, log, out, run

app = typer.Typer(
    help=__doc__,
    cls=DefaultCommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="`python -m export CHECKPOINT` is short for `python -m export bundle CHECKPOINT`.",
)


@app.command()
def bundle(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="random:ViT-B-32, ViT-B/32, openai/clip-vit-base-patch32, a directory or a file"
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Directory of the bundle; default artifacts/<name>.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="bpe_simple_vocab_16e6.txt.gz or tokenizer.json, for weights that bring none.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    activation: Annotated[
        Literal["quick_gelu", "gelu"] | None,
        typer.Option(help="Of a bare weights file, which does not say."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of verified graphs."""
    from export.build import STEPS, build
    from export.checkpoint import load_checkpoint

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=log
    ) as progress:
        task = progress.add_task(f"loading {checkpoint}", total=STEPS + 1)
        loaded = load_checkpoint(checkpoint, vocabulary=vocabulary, activation=activation)
        made = build(
            loaded,
            output or Path("artifacts") / loaded.name,
            lambda step: progress.update(task, description=step, advance=1),
        )
        progress.update(task, description=f"wrote {made.path}", completed=STEPS + 1)
    _report(made, as_json)


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Known checkpoints: name, sizes, and where the weights come from."""
    if as_json:
        models = [asdict(model) for model in KNOWN_MODELS]
        architectures = {name: asdict(config) for name, config in ARCHITECTURES.items()}
        print(json.dumps({"models": models, "architectures": architectures}))
        return
    from export.build import count_parameters

    table = Table(title="Known checkpoints")
    for column in ("checkpoint", "image", "parameters", "embedding", "source"):
        table.add_column(
            column, justify="right" if column in ("parameters", "embedding") else "left"
        )
    for model in KNOWN_MODELS:
        config = ARCHITECTURES[model.architecture]
        source = "hub" if model.source == model.name else model.source.split("/")[2]
        parameters = f"{count_parameters(config) / 1e6:.0f} M"
        size = f"{model.architecture}, {config.image.image_size} px"
        table.add_row(model.name, size, parameters, str(config.embed_dim), source)
    out.print(table)
    out.print(
        "Any Hugging Face id of a CLIP works, any local directory or file, and seeded random "
        f"weights for latency work: random:{', random:'.join(ARCHITECTURES)}"
    )


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a bundle.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The checkpoint it was made from; default: what its manifest says."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's files against its manifest, and run the gate again on this machine."""
    from export.build import verify as verify_bundle

    _report(verify_bundle(Bundle.open(path), checkpoint), as_json)


def _report(made: Bundle, as_json: bool) -> None:
    refused = [a for a in made.manifest.artifacts if not all(v.passed for v in a.verdicts)]
    if as_json:
        print(json.dumps({"path": str(made.path), **json.loads(made.manifest.to_json())}))
    else:
        table = Table(title=f"{made.path}  ({made.manifest.architecture})")
        for column in ("artifact", "MB", "runner", "min cosine", "max |difference|", "verdict"):
            table.add_column(column)
        for tower in TOWERS:
            for artifact in made.manifest.artifacts:
                for v in artifact.verdicts if artifact.tower == tower else ():
                    table.add_row(
                        artifact.file,
                        f"{sum(f.bytes for f in artifact.files) / 1e6:.1f}",
                        v.runner,
                        f"{v.min_cosine:.7f}",
                        f"{v.max_abs_difference:.1e}",
                        "[green]passed[/]" if v.passed else "[red]refused[/]",
                    )
        out.print(table)
    if refused:
        log.print(f"[red]the gate refused {', '.join(a.file for a in refused)}[/]")
        sys.exit(1)


if __name__ == "__main__":
    run(app)
