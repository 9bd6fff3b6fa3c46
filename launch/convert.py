"""Published models as runs, and runs as published models.

  mclr convert --input=DiT-XL-2-256x256.pt --family=dit --out=runs/dit
  mclr convert --workdir=runs/dit_mclr --to=dit_mclr.safetensors

--input is a file (.pkl of EDM and EDM2; .pt or .safetensors of DiT, SiT and REPA) or a folder of
diffusers. Nothing that it names or holds is executed. --family is needed for DiT and SiT, whose
files cannot be told apart, and --set=heads=16,num_classes=1000,image_size=32,path_type=linear,
prediction=velocity,average=ema gives what the file does not hold. --out is then the directory of a
run without a training, which all commands take.

--to writes the weights of a run, or of one that was fine-tuned from it, under their official names:
a file NAME.safetensors, or a folder of diffusers if the model came from one.
"""

import pathlib

from absl import flags

from mclr_jax import pretrained, runs
from mclr_jax.files import made
from mclr_jax.launch import common
from mclr_jax.pretrained import published

WORKDIR, EMA, CHECKPOINT, INTERPOLATION = common.define(
    "workdir", "ema", "checkpoint", "interpolation"
)
INPUT = flags.DEFINE_string("input", None, "Published file, or folder of diffusers.")
OUT = flags.DEFINE_string("out", None, "Directory of the new run.")
FAMILY = flags.DEFINE_enum(
    "family", "", ["", *published.FAMILIES], "Where the file does not tell it."
)
SET = flags.DEFINE_list(
    "set", [], "Values that the file does not hold, as heads=16,num_classes=10."
)
TO = flags.DEFINE_string("to", None, "FILE.safetensors or folder to write --workdir to.")


def main() -> None:
    if (INPUT.value is None) == (WORKDIR.value is None):
        common.stop("Expected --input and --out, to read a published model, or --workdir and --to.")
    if WORKDIR.value:
        if not TO.value:
            common.stop("--workdir needs --to: FILE.safetensors, or a folder of diffusers.")
        run = runs.load(WORKDIR.value)
        params, step = run.weights(EMA.value, CHECKPOINT.value, INTERPOLATION.value)
        pretrained.export(run, params, pathlib.Path(TO.value))
        print(f"Wrote {TO.value}, the weights of step {step}.")
        return
    if not OUT.value:
        common.stop("--input needs --out, the directory of the new run.")
    for text in SET.value:
        if "=" not in text:
            common.stop(f"--set has {text!r}; expected NAME=VALUE, separated by commas.")
    given, out = dict(text.split("=", 1) for text in SET.value), pathlib.Path(OUT.value)
    with made(out):
        run = pretrained.convert(INPUT.value, out, FAMILY.value, **given)
    print(f"Wrote {out}: {published.described(run)}")


if __name__ == "__main__":
    common.run(main)
