#!/bin/sh
# From an empty environment to a fine-tuned model of 600 images of one's own, as a new user goes:
# from the wheel, outside the checkout. Each command of mclr is printed after a $ and counted.
#
#   sh benchmarks/journey.sh [STEPS] > benchmarks/results/journey.txt
#
# The images are emoji of three Unicode groups (Debian's fonts-noto-color-emoji and unicode-data).
# STEPS is that of the base, 2000 by default: a quarter of an hour on two idle cores.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
steps=${1:-2000}
count=0

step() {
    count=$((count + 1))
    printf '\n$ %s\n' "$*"
    "$@" 2>"$place/log" || { cat "$place/log"; exit 1; }
    grep -v "it/s\|Compil\|jax " "$place/log" | sed "s/^[0-9:]* //; s#$place/##g" || true
}

echo "revision $(git -C "$here" rev-parse HEAD)$(git -C "$here" diff --quiet HEAD || echo -dirty)"
cd "$place"
python3 -m venv env
env/bin/pip wheel -q --no-deps --wheel-dir . "$here" >/dev/null 2>&1
env/bin/pip install -q "$(ls ./*.whl)[figures,features]" 2>/dev/null
env/bin/python "$here/benchmarks/emoji_images.py" --out=photos --per_group=200 \
    --groups="Travel & Places,Objects,Flags"
PATH=$place/env/bin:$PATH

step mclr inspect photos --resolution=32 --out=photos.png
step mclr train fashion_mnist --config.data.name=folder:photos --config.data.resolution=32 \
    --config.num_steps="$steps" --workdir=runs/base
step mclr train mclr_null --config.init_from=runs/base --workdir=runs/mclr
step mclr sample --compare=base:1,base:2,mclr:1 --workdir=runs/base --num_samples=24 \
    --out=compared.png
step mclr evaluate --workdir=runs/base --features=efficientnet_lite0 --num_samples=540 \
    --guidance_scales=1,2 --metrics=frechet,per_class_frechet,precision,recall
step mclr evaluate --workdir=runs/mclr --features=efficientnet_lite0 --num_samples=540 \
    --metrics=frechet,per_class_frechet,precision,recall
step mclr report runs/base runs/mclr --out=report.html
printf '\n%s commands of mclr, no file written by hand.\n' "$count"
[ -z "${KEEP:-}" ] || cp photos.png compared.png report.html "$KEEP"
rm -rf "$place"
