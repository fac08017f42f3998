"""Train a CLIP checkpoint on captioned images."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from serving.cli.console import Json, document, note, progress, result, run, table
from serving.util.files import check_directory, check_file, write_text
from training.shapes import PAIRS, label, write_folder

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a run that was stopped, from its last state.")
]
STATES = Path("artifacts/training")


def state_file(output: Path) -> Path:
    """Return the file with the state of an unfinished run."""
    return STATES / f"{output.resolve().name}.pt"


def _check(output: Path) -> None:
    """Check that the checkpoint and the state of the run can be written."""
    check_directory(output)
    check_file(state_file(output))


@app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")] = Path(
        "assets/shapes-clip"
    ),
    seed: Annotated[int, typer.Option(help="Seed of pictures, weights and batches.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=1)] = 7500,
    pictures: Annotated[
        int, typer.Option(help="Number of pictures to draw for training.", min=1000)
    ] = 60_000,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train the demo checkpoint from scratch on drawn pictures, and measure its accuracy."""
    from training.demo import default_settings, make_demo

    _check(output)
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
        typer.Argument(
            metavar="DIR",
            help="Directory of images with captions.txt (one `file, caption` per line) or "
            "dataset.json (a list of objects with image_path and text).",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")],
    start: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to start from. The options on architecture and vocabulary are then "
            "ignored. Default: random weights."
        ),
    ] = None,
    projections_only: Annotated[
        bool,
        typer.Option(
            "--projections-only",
            help="Freeze both towers; train only their projections and the logit scale.",
        ),
    ] = False,
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(help="Pairs per training step.", min=2)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 5e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.", min=0)] = 0,
    tower: Annotated[
        Literal["vit", "resnet"], typer.Option(help="Architecture of the image tower.")
    ] = "vit",
    image_size: Annotated[
        int, typer.Option(help="Input size of the image tower, in pixels.", min=32)
    ] = 64,
    patch_size: Annotated[int, typer.Option(help="Patch size of a ViT, in pixels.", min=4)] = 8,
    width: Annotated[
        int, typer.Option(help="Channels of a ViT, or of the stem of a ResNet.", min=4)
    ] = 128,
    layers: Annotated[
        int, typer.Option(help="Blocks of a ViT, or of each of a ResNet's four stages.", min=1)
    ] = 4,
    vocabulary: Annotated[
        int, typer.Option(help="Maximum number of tokens in the vocabulary.")
    ] = 2000,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train on a directory of captioned images, from scratch or from a checkpoint."""
    from training.contrastive import Settings
    from training.folder import Sizes, train_folder

    _check(output)
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
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Directory to write to. It is created if it does not exist."
        ),
    ],
    count: Annotated[int, typer.Option(help="Number of pictures.", min=1)] = 240,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.", min=0)] = 7,
    size: Annotated[
        int, typer.Option(help="Width and height of a picture, in pixels.", min=16)
    ] = 256,
    as_json: Json = False,
) -> None:
    """Draw captioned pictures, with captions.txt and a list of all labels in labels.txt."""
    written = write_folder(directory, count, seed, size)
    write_text(directory / "labels.txt", "".join(f"{label(pair)}\n" for pair in PAIRS))
    if as_json:
        document({"directory": str(directory), "images": len(written)})
        return
    note(f"wrote {len(written)} pictures to {directory}")


if __name__ == "__main__":
    run(app)
