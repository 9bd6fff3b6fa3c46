"""Colour emoji as images in folders by their Unicode group: a small set that everybody can make.

  python benchmarks/emoji_images.py --out=photos --per_group=200 --groups="Food & Drink,Objects"

Needs the Debian packages fonts-noto-color-emoji and unicode-data. An emoji that the font does not
draw as one picture is left out.
"""

import argparse
import pathlib
import random
import re

from PIL import Image, ImageDraw, ImageFont

FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = pathlib.Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 109  # the only size of the font's bitmaps, which are 136 x 128 pixels


def by_group() -> dict[str, list[str]]:
    """The fully qualified emoji of each group, in the order of Unicode."""
    found: dict[str, list[str]] = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = found.setdefault(line.removeprefix("# group: "), [])
        elif match := re.match(r"([0-9A-F ]+?) *; fully-qualified", line):
            group.append("".join(chr(int(code, 16)) for code in match[1].split()))
    return found


def drawn(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The picture of an emoji on white, (128, 128) pixels; None: it is not one picture."""
    if not 100 < font.getlength(text) < 150:
        return None
    picture = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(picture).text((0, 0), text, font=font, embedded_color=True)
    return picture.crop((4, 0, 132, 128)) if picture.getcolors(1) is None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--groups", default="", help="separated by commas; default: all")
    parser.add_argument("--per_group", type=int, default=0, help="number of images; 0: all")
    given, groups, font = parser.parse_args(), by_group(), ImageFont.truetype(str(FONT), SIZE)
    for group in given.groups.split(",") if given.groups else groups:
        pictures = [(text, picture) for text in groups[group] if (picture := drawn(text, font))]
        random.Random(0).shuffle(pictures)
        folder = given.out / re.sub(r"\W+", "_", group).strip("_").lower()
        if not pictures:
            continue
        folder.mkdir(parents=True)
        for text, picture in pictures[: given.per_group or None]:
            picture.save(folder / f"{'_'.join(f'{ord(char):x}' for char in text)}.png")
        print(f"{folder}: {len([*folder.iterdir()])} images")


if __name__ == "__main__":
    main()
