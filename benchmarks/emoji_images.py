"""Colour emoji as images in folders by their Unicode group: a small set that everybody can make.

  python benchmarks/emoji_images.py --out=photos

Needs the Debian packages fonts-noto-color-emoji and unicode-data. An emoji that the font does not
draw as one picture is left out.
"""

import argparse
import pathlib
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
    out, font = parser.parse_args().out, ImageFont.truetype(str(FONT), SIZE)
    for group, texts in by_group().items():
        pictures = {text: picture for text in texts if (picture := drawn(text, font))}
        if not pictures:
            continue
        folder = out / re.sub(r"\W+", "_", group).strip("_").lower()
        folder.mkdir(parents=True)
        for text, picture in pictures.items():
            picture.save(folder / f"{'_'.join(f'{ord(char):x}' for char in text)}.png")
        print(f"{folder}: {len(pictures)} images")


if __name__ == "__main__":
    main()
