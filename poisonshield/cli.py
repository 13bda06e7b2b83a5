"""The `poisonshield` command: parses, forwards, and turns our errors into one worded message. Imports commands when asked."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from poisonshield.errors import PoisonShieldError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Import and check data sets (tar shards with a manifest).")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="Time parts of the package beside other libraries.")
app.add_typer(bench_app, name="bench")

Config = Annotated[str, typer.Argument(help="A YAML file, for example configs/defend/vespr_cifar10_mini.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. seed=1 defenses.0.eps=8/255")
]


@app.command()
def demo(
    which: Annotated[str, typer.Argument(help="vespr, szt, or both.")] = "both",
    out: Annotated[Path, typer.Option(help="Folder for runs, pictures and reports.")] = Path("poisonshield-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data order, weights and poison.")] = 0,
) -> None:
    """What poisons do and what training brings back: classifiers and VESPR (vespr), learned words and SZT (szt).

    Runs on bundled images and the shipped pipeline, in minutes on a CPU.
    """
    if which not in ("vespr", "szt", "both"):
        raise typer.BadParameter(f"{which!r} is none of vespr, szt, both.")
    if which != "szt":
        from poisonshield.commands.demo import demo as vespr

        vespr(out / "vespr", seed)
    if which != "vespr":
        from poisonshield.commands.demo_szt import demo as szt

        szt(out / "szt", seed)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option(help="Print the resolved settings, and DeepSpeed's, then stop.")
    ] = False,
) -> None:
    """Train one experiment, a classifier's or a textual inversion; the same as `python launch/train.py`."""
    from poisonshield.commands.train import resolved
    from poisonshield.commands.train import train as run

    if print_config:
        print(resolved(config, overrides or []))
    else:
        run(config, overrides or [])


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(help="The run.dir of a finished run.")],
    overrides: Overrides = None,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="Sample as VESPR's authors do; the same as evaluate.legacy=true.")
    ] = False,
) -> None:
    """A finished run's numbers: a classifier's accuracy and probes on clean test images, or each learned word's pictures."""
    from poisonshield.commands.evaluate import evaluate as run
    from poisonshield.commands.evaluate import told

    print(told(run(run_folder, [*(overrides or []), *(["evaluate.legacy=true"] if legacy else [])])))


@app.command()
def grid(
    config: Annotated[str, typer.Argument(help="A grid file, for example configs/grid/vespr_cifar10_mini.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. seeds=[0] dir=runs/try")
    ] = None,
    part: Annotated[str, typer.Option(help="Which part of how many, e.g. 2/4: several jobs share a grid.")] = "1/1",
    only_list: Annotated[
        bool, typer.Option("--list", help="Print the table of what is done, and train nothing.")
    ] = False,
) -> None:
    """Many runs from one file: trains what is not done yet and ends in one table with seeds and spread."""
    from poisonshield.commands.grid import run_grid

    print(run_grid(config, overrides or [], part=part, only_list=only_list))


@app.command()
def poison(config: Config, overrides: Overrides = None) -> None:
    """Write the config's poison: lossless shards (or pictures of concepts) with a measured budget, or a small recipe."""
    from poisonshield.commands.forge import forge_run

    forge_run(config, overrides or [])


@app.command()
def protect(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files, or folders of them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder, or for one picture a name ending in .png.")],
    method: Annotated[
        str | None, typer.Option(help="e.g. advdm, advdm-, sds-, mist-joint, pid, aspl, adaptive-szt; advdm if none.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings of published code, e.g. mist or anti-dreambooth.")
    ] = None,
    eps_levels: Annotated[float | None, typer.Option(help="Radius in 8-bit levels; 8, or the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps on pixels; the method's own if none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a victim would write.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. t_range=[500,1000].")
    ] = None,
    model: Annotated[str, typer.Option(help="A Stable Diffusion folder, or tiny.")] = "tiny",
    dtype: Annotated[str, typer.Option(help="Of the networks: float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    mask: Annotated[Path | None, typer.Option(help="A mask file, or a folder with one of each stem.")] = None,
    target: Annotated[Path | None, typer.Option(help="A picture to pull towards; a pattern if none.")] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Pictures that fsmg or aspl learn the subject from.")
    ] = None,
    class_images: Annotated[
        list[Path] | None, typer.Option(help="Other pictures of the class, for prior_weight.")
    ] = None,
    tile: Annotated[int, typer.Option(help="Larger sides are attacked in tiles of this side; 0 for never.")] = 512,
    micro_batch: Annotated[int, typer.Option(help="Pictures of one size that are computed together.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the objective before and after.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that were made otherwise.")] = False,
) -> None:
    """Poison photographs against a diffusion model: PNG of the same size, budget checked on the file, manifest beside it."""
    from poisonshield.commands.protect import protect as run

    run(
        images, out, method=method, preset=preset, eps_levels=eps_levels, steps=steps, prompt=prompt,
        settings=setting or [], model=model, dtype=dtype, device=device, seed=seed, mask=mask, target=target,
        reference=reference or [], class_images=class_images or [], tile=tile, micro_batch=micro_batch,
        measure=measure, overwrite=overwrite,
    )  # fmt: skip


@app.command()
def masks(
    photos: Annotated[Path, typer.Argument(help="A folder of photos, or a folder with one of each concept.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for masks.png, and for photos with their masks.")],
    mask: Annotated[str, typer.Option(help="grabcut, box, attention or ssm.")] = "grabcut",
    side: Annotated[
        float | None, typer.Option(help="Side of the centred rectangle of box and grabcut, a share of the photo's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For attention and ssm: a Stable Diffusion folder, or tiny.")
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="What attention and ssm look for, or CONCEPT=WORD; repeatable.")
    ] = None,
    purifier: Annotated[
        str, typer.Option(help="Masks are found on pixels purified by it; none for as they are.")
    ] = "jpeg:25",
    size: Annotated[int, typer.Option(min=8, help="Pixels of the longer side on which masks are found.")] = 512,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over masks that are there.")] = False,
) -> None:
    """Masks of photos as files, to look at and correct before training; status 1 if one came out empty."""
    from poisonshield.commands.masks import masks as run
    from poisonshield.commands.masks import told

    given = {} if side is None else {"side": side}
    found = run(photos, out, mask=mask, model=model, words=word or [], size=size, seed=seed, overwrite=overwrite,
                purifier=None if purifier == "none" else purifier, **given)  # fmt: skip
    print("\n".join(told(found)))
    if found.empty:
        raise typer.Exit(1)


@app.command()
def survival(
    clean: Annotated[Path, typer.Argument(help="Folder of the pictures as they were.")],
    poisoned: Annotated[list[Path], typer.Argument(help="Folders of the same pictures poisoned, by stem.")],
    purifier: Annotated[
        list[str] | None,
        typer.Option(help="e.g. jpeg:75, gaussian:2, sdedit:0.3,steps=50; repeatable; a standard list if none."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For vae_roundtrip and sdedit: a Stable Diffusion folder, or tiny.")
    ] = None,
    bands: Annotated[int, typer.Option(min=1, help="Parts of the frequencies up to half a cycle a pixel.")] = 4,
    seed: Annotated[int, typer.Option(help="Of purifiers' noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write every picture's numbers to this JSON file.")] = None,
) -> None:
    """What purifiers leave of poisons, in all and by frequency, and what they cost clean pictures."""
    from poisonshield.commands.survival import survival as run
    from poisonshield.commands.survival import told

    print(told(run(clean, poisoned, purifiers=purifier or [], model=model, bands=bands, seed=seed, out=out)))


@app.command()
def pipeline(config: Config, overrides: Overrides = None) -> None:
    """Train a small Stable Diffusion pipeline on a rendered world, from nothing and in under two hours on two cores."""
    from poisonshield.commands.pipeline import train_pipeline

    print(train_pipeline(config, overrides or []))


@app.command()
def generate(
    pipeline: Annotated[str, typer.Argument(help="A Stable Diffusion folder, or tiny for the shipped pipeline.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for pictures, sheet.png and generate.json.")],
    embedding: Annotated[
        list[str] | None, typer.Option(help="FILE of a learned word, or WORD=FILE to call it otherwise; repeatable.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="{} stands for each word in turn; repeatable.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Of the noise; prompts of one wording share it.")] = 42,
    switch: Annotated[
        int | None, typer.Option(help="Below this timestep, --switch-word speaks in place of learned words.")
    ] = None,
    switch_word: Annotated[str | None, typer.Option(help="E.g. the word that learning started from.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side; the pipeline's own if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the networks: fp32, bf16 or fp16.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over pictures that are there.")] = False,
) -> None:
    """Draw pictures of learned words, or of any prompt, with noise that all words share."""
    from poisonshield.commands.generate import generate as run

    run(pipeline, out, embeddings=embedding or [], prompts=prompt or ["a photo of a {}"], count=count, steps=steps,
        guidance=guidance, seed=seed, switch=switch, switch_word=switch_word, size=size, dtype=dtype,
        overwrite=overwrite)  # fmt: skip
    print(out / "sheet.png")


@app.command()
def convert(
    embedding: Annotated[Path, typer.Argument(help="The file of a learned word: .safetensors, .pt or .bin.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write; one that exists is kept.")],
    form: Annotated[str, typer.Option(help="diffusers or kohya (.safetensors), or a1111 (.pt).")] = "diffusers",
    token: Annotated[
        str | None, typer.Option(help="What to call the word, or which one of several; the file's own if none.")
    ] = None,
) -> None:
    """Write a learned word in the form that another tool reads."""
    from poisonshield.commands.convert import convert as run

    learned = run(embedding, out, form=form, token=token)
    print(f"{out}  {learned.token}, {len(learned.vectors)} vectors of {learned.vectors.shape[1]}")


@app.command()
def sensitivity(
    pipeline: Annotated[str, typer.Argument(help="A Stable Diffusion folder, or tiny for the shipped pipeline.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files, or one folder of them.")],
    embedding: Annotated[Path, typer.Option(help="The learned word's file.")],
    out: Annotated[Path, typer.Option(help="Folder for the maps and sensitivity.json.")],
    reference: Annotated[Path | None, typer.Option(help="Folder of the same pictures clean, by file name.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of masks by file name.")] = None,
    against: Annotated[str | None, typer.Option(help="Embedding file or word, for delta and signed.")] = None,
    mode: Annotated[str, typer.Option(help="loss_grad, pred_jac, input_sal, delta or signed.")] = "loss_grad",
    timestep: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    prompt: Annotated[str, typer.Option(help="{} stands for the learned word.")] = "a photo of a {}",
    probes: Annotated[int, typer.Option(min=1, help="Random directions of the word's vectors.")] = 64,
    exact: Annotated[bool, typer.Option("--exact", help="All directions instead of random ones.")] = False,
    noises: Annotated[int, typer.Option(min=1, help="Draws of the noise.")] = 8,
    norm: Annotated[str, typer.Option(help="Scale of the drawing: joint, self or sum1.")] = "joint",
    size: Annotated[int | None, typer.Option(help="Pixels a side; the pipeline's own if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of noise and directions.")] = 0,
) -> None:
    """Where a learned word looks in pictures, by timestep: maps, totals and the concept's share."""
    from poisonshield.commands.sensitivity import TIMESTEPS
    from poisonshield.commands.sensitivity import sensitivity as run

    run(pipeline, images, embedding, out, reference=reference, masks=masks, against=against, mode=mode,
        timesteps=timestep or TIMESTEPS, prompt=prompt, probes=probes, exact=exact, noises=noises, norm=norm, size=size,
        seed=seed)  # fmt: skip
    print(out)


@app.command()
def profile(
    pipeline: Annotated[str, typer.Argument(help="A Stable Diffusion folder, or tiny for the shipped pipeline.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files, or one folder of them.")],
    embedding: Annotated[Path, typer.Option(help="The word's file, where training stands; best near its start.")],
    out: Annotated[Path, typer.Option(help="Folder for profile.json and profile.png.")],
    reference: Annotated[
        str | None, typer.Option(help="Folder of the same pictures clean, or a purifier such as jpeg:25.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of masks by file name.")] = None,
    prompt: Annotated[str, typer.Option(help="{} stands for the learned word.")] = "a photo of a {}",
    bins: Annotated[int, typer.Option(min=1, help="Parts of the timesteps.")] = 20,
    noises: Annotated[int, typer.Option(min=2, help="Draws of timestep and noise per picture and bin.")] = 16,
    size: Annotated[int | None, typer.Option(help="Pixels a side; the pipeline's own if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of timesteps and noise.")] = 0,
) -> None:
    """At which timesteps a word is learned and a poison bends its gradient, and the first timestep to train from."""
    from poisonshield.commands.profile import profile as run

    record = run(pipeline, images, embedding, out, reference=reference, masks=masks, prompt=prompt, bins=bins,
                 noises=noises, size=size, seed=seed)  # fmt: skip
    print(out if record["t_min"] is None else f"{out}  t_min {record['t_min']}")


@app.command()
def doctor() -> None:
    """Versions, devices, backends and why, and whether multi-process launch would work."""
    from poisonshield.commands.doctor import doctor as run

    run()


@data_app.command("import")
def data_import(
    src: Annotated[Path, typer.Argument(help="A class-folder tree, torchvision's CIFAR-10 folder, or tar shards.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards and manifest.")],
    size: Annotated[
        int | None, typer.Option(help="Resize the shorter side and centre-crop to this many pixels.")
    ] = None,
    class_list: Annotated[
        Path | None, typer.Option(help="File with one class folder a line: order and subset.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Which tars, as a file name pattern.")] = "*",
    jpeg_quality: Annotated[int | None, typer.Option(help="Write resized images as JPEG instead of PNG.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Images in one tar.")] = 5000,
    skip_broken: Annotated[
        bool, typer.Option(help="Drop images that do not decode, and list them in the manifest.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a data set that is already there.")] = False,
) -> None:
    """Turn images into a data set of tar shards."""
    from poisonshield.commands.data import import_data

    import_data(
        src,
        out,
        size=size,
        class_list=class_list,
        pattern=pattern,
        jpeg_quality=jpeg_quality,
        samples_per_shard=samples_per_shard,
        skip_broken=skip_broken,
        overwrite=overwrite,
    )


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="A data set, or a folder with train/ and test/.")]) -> None:
    """Check hashes and decode every sample; lists every problem."""
    from poisonshield.commands.data import verify

    if verify(folder):
        raise typer.Exit(1)


@bench_app.command("ops")
def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="jpeg, pgd or diffusion; all if not given.")] = None,
    out: Annotated[Path, typer.Option(help="CSV that rows are added to.")] = Path("bench.csv"),
    plot: Annotated[Path | None, typer.Option(help="Also draw the medians into this PNG.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each provider, interleaved.")] = 15,
    quick: Annotated[bool, typer.Option(help="Tiny tensors: does it work, not how fast.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
) -> None:
    """Differentiable JPEG, PGD step and diffusion loss beside kornia, torchattacks, diffusers, eager and torch.compile."""
    from poisonshield.bench import bench as run

    run(op or [], out, plot, rounds, quick, threads)


@bench_app.command("vespr")
def bench_vespr(
    out: Annotated[Path | None, typer.Option(help="Also add rows to this CSV.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each, interleaved.")] = 15,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the attack.")] = 10,
    quick: Annotated[bool, typer.Option(help="A tiny network: does it work, not how fast.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
) -> None:
    """One joint training step on the CPU beside the VESPR authors' way of taking it, checked to be the same step."""
    from poisonshield.bench.vespr import bench as run

    run(out, rounds, quick, steps, threads)


@bench_app.command("invert")
def bench_invert(
    pipeline: Annotated[str, typer.Option(help="A diffusers folder, or tiny for the shipped pipeline.")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="Also add rows to this CSV.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each, interleaved.")] = 15,
    quick: Annotated[bool, typer.Option(help="Few pictures: does it work, not how fast.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
) -> None:
    """A step of textual inversion with kept latents beside latents made anew, and of eight concepts beside one."""
    from poisonshield.bench.inversion import bench as run

    run(out, rounds, quick, threads, pipeline)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors of ours end with status 1 and their words only; a preempted run ends with 75."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app(arguments, standalone_mode=True)
    except PoisonShieldError as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
