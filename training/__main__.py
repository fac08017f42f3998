"""`python -m training`: captioned pictures -> checkpoint."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from serving.cli.console import Json, document, note, progress, result, run, table
from training.shapes import PAIRS, label, write_folder

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
STATES = Path("artifacts/training")


def state_file(output: Path) -> Path:
    """Where the state of an unfinished run is kept."""
    return STATES / f"{output.resolve().name}.pt"


@app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="Directory of the checkpoint.")] = Path(
        "assets/shapes-clip"
    ),
    seed: Annotated[int, typer.Option(help="Of pictures, weights and batches.", min=0)] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 7500,
    pictures: Annotated[int, typer.Option(help="To draw for training.", min=1000)] = 60_000,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Make the demo checkpoint from nothing: draw pictures, train, measure."""
    from training.demo import default_settings, make_demo

    with progress("drawing") as show:
        report = make_demo(
            output,
            state_file(output),
            default_settings(steps, seed),
            pictures,
            os.cpu_count() or 1,
            resume,
            show,
        )
    if as_json:
        document(report)
        return
    rows = [("seen pairs", f"{report.seen:.1%}"), ("held-out pairs", f"{report.held_out:.1%}")]
    result(table(str(output), ("drawings", ">zero-shot top-1 of 100 captions"), rows))


@app.command()
def folder(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="With captions.txt (`file, caption`) or dataset.json."),
    ],
    output: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    start: Annotated[
        str | None,
        typer.Option(help="A checkpoint to start from, instead of random weights of these sizes."),
    ] = None,
    projections_only: Annotated[
        bool, typer.Option("--projections-only", help="Freeze both towers.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    learning_rate: Annotated[float, typer.Option(min=0)] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of weights and batches.", min=0)] = 0,
    tower: Annotated[Literal["vit", "resnet"], typer.Option(help="Of pictures.")] = "vit",
    image_size: Annotated[int, typer.Option(help="In pixels.", min=32)] = 64,
    patch_size: Annotated[int, typer.Option(help="Of a ViT, in pixels.", min=4)] = 8,
    width: Annotated[int, typer.Option(help="Of a ViT, or of a ResNet's stem.", min=4)] = 128,
    layers: Annotated[int, typer.Option(help="Of a ViT, or of each ResNet stage.", min=1)] = 4,
    vocabulary: Annotated[int, typer.Option(help="Most tokens to learn.")] = 2000,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train on your own pairs."""
    from training.contrastive import Settings
    from training.folder import Sizes, train_folder

    settings = Settings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, min(100, steps // 10)),
        seed=seed,
        projections_only=projections_only,
    )
    sizes = Sizes(
        tower=tower,
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        vocabulary=vocabulary,
    )
    with progress("reading images") as show:
        state = state_file(output)
        report = train_folder(directory, output, state, settings, sizes, start, resume, show)
    if as_json:
        document(report)
        return
    result(
        f"{output}: {report.images} images, {report.captions} captions, loss "
        f"{report.first_loss:.3f} -> {report.last_loss:.3f}"
    )


@app.command()
def pictures(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if need be.")],
    count: Annotated[int, typer.Option(min=1)] = 240,
    seed: Annotated[int, typer.Option(min=0)] = 7,
    size: Annotated[int, typer.Option(help="Side, in pixels.", min=16)] = 256,
    as_json: Json = False,
) -> None:
    """Draw a folder of captioned pictures: files, captions.txt, and all labels in labels.txt."""
    written = write_folder(directory, count, seed, size)
    labels = directory / "labels.txt"
    labels.write_text("".join(f"{label(pair)}\n" for pair in PAIRS), encoding="utf-8")
    if as_json:
        document({"directory": str(directory), "images": len(written)})
        return
    note(f"{len(written)} pictures in {directory}")


if __name__ == "__main__":
    run(app)
