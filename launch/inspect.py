"""Print what a data set has, and draw a picture of some examples of each class.

  mclr inspect photos --resolution=32 --out=photos.png

The set is a folder, a zip or an npz file, or another source as config.data.name has it.
"""

from absl import flags

from mclr_jax import images
from mclr_jax.data import sources
from mclr_jax.launch import common

OUT = flags.DEFINE_string("out", "inspect.png", "File to write, NAME.png.")
RESOLUTION, LABELS = common.define("resolution", "labels")


def main(place: str) -> None:
    out = common.output(OUT.value, ".png")
    data = sources.Data(sources.at(place), resolution=RESOLUTION.value, labels=LABELS.value)
    lines, some = sources.inspect(data)
    print("\n".join(lines))
    images.save(out, images.of_source(some, 8))
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main, usage="Name one data set: mclr inspect photos --out=photos.png")
