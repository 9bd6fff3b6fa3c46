"""Write a folder of images as a zip in the format of EDM, cropped and resized.

  mclr data photos --resolution=32 --out=mine.zip
  mclr train cifar10 --config.data.name=zip:mine.zip --config.data.test=zip:test.zip \\
      --config.sigma_data=0 --workdir=runs/mine

The sub-folders are the classes, whose names the zip has, too; or --labels names a CSV file. A zip
or another source, as config.data.name has it, is written in the same way. --split=train and
--split=test write the parts of the data that training would learn from and hold out.
"""

from absl import flags

from mclr_jax.data import folders
from mclr_jax.data.sources import Data, at
from mclr_jax.launch import common
from mclr_jax.training.log import Progress

OUT = flags.DEFINE_string("out", None, "File to write, NAME.zip.")
RESOLUTION, LABELS = common.define("resolution", "labels")
BACKGROUND = flags.DEFINE_string("background", "white", "Colour behind transparent pixels.")
SPLIT = flags.DEFINE_enum("split", "all", ["all", "train", "test"], "Part of the data.")
UNCONDITIONAL = flags.DEFINE_bool("unconditional", False, "Leave the labels aside: one class.")


def main(place: str) -> None:
    out = common.output(OUT.value, ".zip")
    whole = {"held_out": 0.0} if SPLIT.value == "all" else {}
    data = Data(
        at(place), resolution=RESOLUTION.value, labels=LABELS.value,
        background=BACKGROUND.value, unconditional=UNCONDITIONAL.value, **whole,
    )  # fmt: skip
    source = data.source("test" if SPLIT.value == "test" else "train", seed=0)
    with Progress(len(source), "image") as progress:
        folders.write(source, out, progress.update)
    print(f"Wrote {out}: {len(source)} images of {source.shape} in {source.num_classes} classes.")


if __name__ == "__main__":
    usage = "Name one folder of images: mclr data FOLDER --resolution=32 --out=mine.zip"
    common.run(main, "out", usage=usage)
