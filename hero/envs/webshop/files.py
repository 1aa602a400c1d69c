"""WebShop's files, from a folder of the user."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from hero.envs.shop.catalogue import is_sold

ITEMS, NOTES, NOUNS = "items_shuffle*.json", "items_ins_v2*.json", "title_nouns.json"
HUMAN = "items_human_ins*.json"
CHUNK = 1 << 20
"""Characters read at once from a file that is streamed."""


def find(folder: Path, pattern: str) -> Path:
    """The one file of a kind.

    Raises:
        ValueError: the folder is missing, or it holds none or several of a kind.
    """
    if not folder.is_dir():
        raise ValueError(
            f"data_dir={str(folder)!r} is not a folder: name the one with WebShop's files."
        )
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = [path.name for path in found]
        raise ValueError(
            f"data_dir={str(folder)!r} holds {names} for {pattern!r}; expected exactly one file. "
            f"It needs WebShop's {ITEMS} and {NOTES} (for human goals {HUMAN} instead), and "
            f"{NOUNS}, which maps each asin to the lower-case nouns of its title "
            "(docs/environments/webshop.md)."
        )
    return found[0]


def entries(path: Path, begins: str = "[") -> Iterator[Any]:
    """Elements of the array, or with `begins="{"` (key, value) pairs of the object, in a JSON file.

    One at a time, so that the file may be larger than the memory.

    Raises:
        ValueError: the file does not hold one, or is cut short.
    """
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8") as file:
        text = file.read(CHUNK).lstrip()
        if not text.startswith(begins):
            kind = {"[": "array", "{": "object"}[begins]
            raise ValueError(f"{path} is not WebShop's: it must hold a JSON {kind}.")
        text, at = text[1:], 0
        while True:
            at = _skip(text, at, ",")
            if text[at : at + 1] in ("]", "}"):
                return
            try:
                value, end = decode(text, at)
                if begins == "{":
                    end = _skip(text, end, ":")
                    key, (value, end) = value, decode(text, end)
                    value = (key, value)
                after = _skip(text, end, "")
                if text[after : after + 1] not in (",", "]", "}"):  # a number may go on
                    raise json.JSONDecodeError("a value is followed by nothing", text, end)
            except json.JSONDecodeError as error:
                more = file.read(CHUNK)
                if not more:
                    raise ValueError(f"{path} is cut short or is not JSON: {error}") from None
                text, at = text[at:] + more, 0
                continue
            yield value
            at = end


def _skip(text: str, at: int, mark: str) -> int:
    while text[at : at + 1].isspace() or (mark and text[at : at + 1] == mark):
        at += 1
    return at


def check_item(item: Any, path: Path) -> dict[str, Any]:
    """A product of the file, which has what is read from it."""
    needed = {"asin", "name", "full_description", "small_description", "customization_options",
              "query", "product_category"}  # fmt: skip
    lacks = needed - set(item) if isinstance(item, dict) else needed
    if lacks:
        raise ValueError(
            f"{path} is not WebShop's: a product lacks {', '.join(sorted(lacks))} ({item!r:.80})."
        )
    return dict(item)


def check_nouns(asin: str, nouns: Container[str], folder: Path) -> None:
    """Without its nouns a product would be scored as another one than it is.

    Raises:
        ValueError: they are missing.
    """
    if is_sold(asin) and asin not in nouns:
        raise ValueError(
            f"{NOUNS} in {folder} lacks the product {asin!r}: it must hold a list for each one, "
            "empty if its title has no noun (docs/environments/webshop.md)."
        )
