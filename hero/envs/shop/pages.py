"""Pages as text, in three observation styles.

- `text`: the visible strings of the official page, joined by ` [SEP] `.
- `text_rich`: one string a line, buttons as `[button] x [button_]`.
- `compact`: the fewest words that tell the same, for models of a few hundred thousand parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from hero.envs.shop.catalogue import Goal, Product
from hero.envs.shop.protocol import BACK, BUY, DETAILS, NEXT, PREV, State, View
from hero.envs.shop.reward import Score
from hero.envs.shop.store import Shop

SEPARATOR = " [SEP] "
WHITESPACE = " \n\t\f\r"
HTML_SAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027"})

FINAL_PAGE = (
    "Thank you for shopping with us!|Your code: |None| (Paste it in your MTurk interface.)"
    "|Purchased|asin|{asin}|options|{options}|attrs|None|category|None|query|None"
    "|product category|None|Target|asin|options|attrs|price upper|instuction text|category"
    "|product category|query|Goal |None|Reward|Your score (min 0.0, max 1.0)|{reward}"
    "|Reward Details |None"
)
"""Strings of the final page as the official templates have them, misspelling included."""

Fragment = tuple[str, str]
"""(kind, string) with kind one of text, button, option, asin."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page is made from."""

    shop: Shop
    goal: Goal
    state: State
    score: Score | None
    """Of the purchase, on the final page."""


def render_text(page: Page) -> str:
    return SEPARATOR.join(string.strip() for _, string in _fragments(page))


def render_text_rich(page: Page) -> str:
    address = _address(page.state)
    notes, lines = [], []
    for kind, string in _fragments(page):
        if kind == "button":
            lines.append(f"[button] {string} [button_]\n")
        elif kind == "asin":
            mark = "clicked button" if string in page.state.visited else "button"
            lines.append(f"\n[{mark}] {string} [{mark}_]\n")
        elif kind == "option" and f'"{string}"' in address:
            lines.append(f"  [clicked button] {string} [clicked button_]\n")
            notes.append(f"You have clicked {string}.\n")
        elif kind == "option":
            lines.append(f"  [button] {string} [button_]\n")
        else:
            lines.append(f"{string}\n")
    return "".join(reversed(notes)) + "".join(lines)


def render_compact(page: Page) -> str:
    state, shop = page.state, page.shop
    if state.view is View.INDEX:
        text = f"goal {page.goal.instruction}"
    elif state.view is View.RESULTS:
        shown = shop.results_page(state.query, state.number)
        text = "results " + " ; ".join(f"{shop.products[asin].title} {asin}" for asin in shown)
    elif state.view is View.ITEM:
        text = _compact_item(shop.products[state.asin], state)
    elif state.view is View.DETAIL:
        text = " ".join([state.detail, *_detail(state.detail, shop.products[state.asin])])
    else:
        text = f"done score {_score(page).reward:.2f}"
    return " ".join(text.lower().split())


RENDERERS: dict[str, Callable[[Page], str]] = {
    "text": render_text,
    "text_rich": render_text_rich,
    "compact": render_compact,
}


def _compact_item(product: Product, state: State) -> str:
    words = ["item", product.title, f"price {product.price:g}"]
    words += [f"{name} {' '.join(values)}" for name, values in product.options.items()]
    if state.options:
        words.append("chosen " + " ".join(state.chosen))
    return " ".join(words)


def _fragments(page: Page) -> list[Fragment]:
    """The strings of the page; those that an HTML parser does not see are left out."""
    state, shop = page.state, page.shop
    if state.view is View.INDEX:
        head = ["WebShop", "Instruction: ", page.goal.instruction]
        return [*(("text", string) for string in head), ("button", "Search")]
    if state.view is View.DONE:
        fragments = [("text", string) for string in _final_strings(page)]
    else:
        fragments = [("text", "Instruction:"), ("text", page.goal.instruction), ("button", BACK)]
        if state.view is View.RESULTS:
            fragments += _results_fragments(state, shop)
        elif state.view is View.ITEM:
            fragments += _item_fragments(shop.products[state.asin])
        else:
            fragments.append(("button", PREV))
            fragments += [
                ("text", text) for text in _detail(state.detail, shop.products[state.asin])
            ]
    return [
        (kind, string) for kind, string in fragments if string.strip(WHITESPACE) or string == " "
    ]


def _results_fragments(state: State, shop: Shop) -> list[Fragment]:
    total = len(shop.search(state.query))
    fragments: list[Fragment] = [("text", f"Page {state.number} (Total results: {total})")]
    fragments += [("button", PREV)] if state.number > 1 else []
    fragments.append(("button", NEXT))
    for asin in shop.results_page(state.query, state.number):
        product = shop.products[asin]
        fragments += [("asin", asin), ("text", product.title), ("text", product.price_tag)]
    return fragments


def _item_fragments(product: Product) -> list[Fragment]:
    fragments: list[Fragment] = [("button", PREV)]
    for name, values in product.options.items():
        fragments.append(("text", name))
        fragments += [("option", value) for value in values]
    fragments += [
        ("text", product.title),
        ("text", f"Price: {product.price_tag}"),
        ("text", "Rating: N.A."),
    ]
    return [*fragments, *(("button", detail) for detail in DETAILS), ("button", BUY)]


def _detail(detail: str, product: Product) -> list[str]:
    """The strings of a detail page; the catalogues hold no reviews."""
    if detail == "Description":
        return [product.description]
    return [f" {bullet}" for bullet in product.bullets] if detail == "Features" else []


def _final_strings(page: Page) -> list[str]:
    """The official final page, with the fields that it leaves unfilled."""
    options = json.dumps(dict(page.state.options), sort_keys=True).translate(HTML_SAFE)
    filled = {"asin": page.state.asin, "options": options, "reward": _score(page).reward}
    return [string.format_map(filled) for string in FINAL_PAGE.split("|")]


def _score(page: Page) -> Score:
    assert page.score is not None, "the final page needs the score of the purchase"
    return page.score


def _address(state: State) -> str:
    """The end of the official page's address, in which the rich style looks for clicked options."""
    query = "+".join(state.query.split(" "))
    return f"{state.asin}/{query}/{state.number}/{json.dumps(dict(state.options))}"
