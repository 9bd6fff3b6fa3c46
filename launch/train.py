"""Train a model, or continue a run that was stopped.

  mclr train digits --workdir=runs/digits

Every key of the config is also a flag: --config.batch_size=64 --config.data.limit=512.
--help explains all keys. The same command, or --workdir alone, resumes a run that was killed, bit
for bit; to train longer, raise --config.num_steps; other keys that decide what the steps learn are
changed with --change. The work directory gets run.json (what was run), metrics.jsonl and
tensorboard/ (curves), samples/ (pictures) and checkpoints/. Sample from it with mclr sample. A run
that Ctrl-C or SIGTERM has stopped exits with status 130 or 143.

On several hosts run the same command on each: with --coordinator=auto on TPU pods and Slurm, else
with --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

from absl import flags

from mclr_jax import cpu, inherit
from mclr_jax.launch import common
from mclr_jax.main import train

common.define("config", *common.HOSTS)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
CHANGE = flags.DEFINE_bool(
    "change", False, "Train on with other values of keys that decide what the steps learn."
)
RESTART = flags.DEFINE_bool("restart", False, "Move the run to WORKDIR/replaced, and begin anew.")


def main() -> None:
    common.connect(WORKDIR.value)
    training = inherit.training(flags.FLAGS.config, WORKDIR.value)
    cpu.use_cores(training.network.factory, training.batch_size)
    train(training, WORKDIR.value, restart=RESTART.value, change=CHANGE.value)


if __name__ == "__main__":
    common.run(main, "config", "workdir")
