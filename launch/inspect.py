"""Print what a data set has, and draw a picture of some examples of each class.

  mclr inspect photos --resolution=32 --out=photos.png

The set is a folder, a zip or an npz file, or another source as config.data.name has it.
"""

import numpy as np
from absl import flags

from mclr_jax import images
from mclr_jax.data import sources
from mclr_jax.data.pixels import to_float
from mclr_jax.launch import common

OUT = flags.DEFINE_string("out", "inspect.png", "File to write, NAME.png.")
RESOLUTION, LABELS = common.define("resolution", "labels")


def main(places: list[str]) -> None:
    if len(places) != 1:
        common.stop("Name one data set: mclr inspect photos --out=photos.png")
    out = common.output(OUT.value, ".png")
    data = sources.Data(sources.at(places[0]), resolution=RESOLUTION.value, labels=LABELS.value)
    lines, some = sources.inspect(data)
    print("\n".join(lines))
    examples, labels = some[np.arange(len(some))]
    names = getattr(some, "class_names", ())
    images.save(out, images.picture(to_float(examples), labels, 8, names))
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main, arguments=True)
