"""How many parameters the network of every config has, for the data that it is for.

python benchmarks/parameters.py     # writes benchmarks/results/parameters.json
"""

import tasks

from mclr_jax import experiment
from mclr_jax.files import provenance, write_json
from mclr_jax.model import DataInfo

# Shape of an example and number of classes, so that no data set need be there.
DATA = {
    "mixture": ((2,), 3),
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "tfds:cifar10": ((32, 32, 3), 10),
    "lorenz63": ((32, 3), 1),
    "lorenz96": ((32, 40), 1),
    "kuramoto_sivashinsky": ((32, 128), 1),
    "navier_stokes": ((16, 64, 64, 1), 1),
}


def count(file: str) -> dict:
    """The row of configs/FILE.py."""
    config = tasks.config_of(file)
    shape, classes = DATA[config.data.get("system", config.data.name)]
    model = experiment.make_model(config, DataInfo(shape, classes, sigma_data=1.0))
    return {
        "config": f"configs/{file}.py",
        "network": config.network.name,
        "data": config.data.name,
        "shape": shape,
        "classes": classes,
        "parameters": tasks.parameters(model),
    }


def main() -> None:
    files = sorted(path.stem for path in (tasks.ROOT / "configs").glob("*.py"))
    rows = [count(file) for file in files if file not in ("__init__", "base")]
    write_json(tasks.RESULTS / "parameters.json", {**provenance(), "rows": rows})
    for row in rows:
        print(f"{row['config']:40s} {row['network']:16s} {row['parameters']:12,d}")


if __name__ == "__main__":
    main()
