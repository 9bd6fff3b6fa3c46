"""Encode images as latents: a zip in the format of EDM2, to train on.

  mclr encode --data=zip:imagenet256.zip --autoencoder=sd-vae-ft-mse \\
      --latents=stable_diffusion --out=latents.zip
  mclr train finetune --config.init_from=runs/sit \\
      --config.data.name=zip:latents.zip --config.data.latents=stable_diffusion \\
      --config.data.autoencoder=sd-vae-ft-mse --workdir=runs/sit_mclr

--data is a source as config.data.name has it; folder:PATH is a folder of images. The autoencoder is
a folder of diffusers. --latents says for which models: edm2 (pixels in [0, 1]), or stable_diffusion
(DiT, SiT and REPA: [-1, 1]). The zip has the mean and the standard deviation of each latent, from
which training draws anew in each step.
"""

from absl import flags

from mclr_jax import latents
from mclr_jax.data.latents import KINDS
from mclr_jax.data.sources import Data
from mclr_jax.launch import common
from mclr_jax.training.log import Progress

DATA = flags.DEFINE_string("data", None, "Source of the images, as config.data.name.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Folder of diffusers with an autoencoder.")
LATENTS = flags.DEFINE_enum("latents", None, [*KINDS], "For which models; see above.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.zip.")
SPLIT = flags.DEFINE_enum("split", "train", ["train", "test"], "Part of the data.")
PATH = flags.DEFINE_string("path", "", "Folder of the files, as config.data.path.")
(RESOLUTION,) = common.define("resolution")


def main() -> None:
    out = common.output(OUT.value, ".zip")
    data = Data(DATA.value, path=PATH.value, resolution=RESOLUTION.value, held_out=0.0)
    source = data.source(SPLIT.value, seed=0)
    with Progress(len(source), "image") as progress:
        latents.encode(source, AUTOENCODER.value, LATENTS.value, out, progress.update)
    print(f"Wrote {out}: {len(source)} examples in {source.num_classes} classes.")


if __name__ == "__main__":
    common.run(main, "data", "autoencoder", "latents", "out")
