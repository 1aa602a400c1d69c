"""The shop on WebShop's own data.

Oracle: what the official server makes of these files (its product records, its number of goals)
and the rewards measured on it. The data is not part of this repository: name its folder in
HERO_WEBSHOP_DATA.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shop_helpers import finish

from hero.envs.shop import ShopEnv
from hero.envs.shop.store import open_shop

BESIDE_THE_REPOSITORY = Path(__file__).parents[3] / "shared" / "data" / "webshop_1k"
DATA = Path(os.environ.get("HERO_WEBSHOP_DATA", BESIDE_THE_REPOSITORY))

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no WebShop data in {DATA.name}: set HERO_WEBSHOP_DATA"
)


def test_goals_are_the_official_ones() -> None:
    env = ShopEnv("full", data_dir=str(DATA))
    sizes = {split: len(env.tasks(split)) for split in ("test", "dev", "train")}
    assert sizes["test"] == 500 and sizes["dev"] == 1000
    assert len(open_shop("full", None, 0, str(DATA.resolve())).goals) == 6910


def test_products_are_read_as_the_official_server_does() -> None:
    shop = open_shop("full", None, 0, str(DATA.resolve()))
    lines = (DATA / "documents_1k.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(shop.products) == 1000
    for line in lines:
        document = json.loads(line)
        product, official = shop.products[document["id"]], document["product"]
        assert product.search_text == document["contents"]
        assert product.title == official["Title"]
        assert product.description == official["Description"]
        assert list(product.bullets) == official["BulletPoints"]
        assert product.price_tag == official["Price"]
        assert list(product.attributes) == official["Attributes"]
        assert {name: list(v) for name, v in product.options.items()} == official["options"]


def test_oracle_earns_what_it_earns_on_the_official_server() -> None:
    env = ShopEnv("full", data_dir=str(DATA), mode="strict")
    rewards = []
    for task in env.tasks("test")[:200]:
        env.reset(task)
        rewards.append(finish(env)[0])
    # The rest asks for colours that the official reward cannot match (see `option_matches`).
    assert sum(rewards) / len(rewards) == pytest.approx(0.995, abs=0.002)
    assert rewards.count(1.0) == 194


def test_strict_results_page_shows_the_official_records() -> None:
    lines = (DATA / "documents_1k.jsonl").read_text(encoding="utf-8").splitlines()
    official = {(document := json.loads(line))["id"]: document["product"] for line in lines}
    env = ShopEnv("full", data_dir=str(DATA), mode="strict")
    for task in env.tasks("test")[:20]:
        env.reset(task)
        page, _, _, _, info = env.step(env.oracle())
        shown = [name for name in (a[6:-1] for a in info["available_actions"]) if name in official]
        records = [
            f"{asin} [SEP] {official[asin]['Title'].strip()} [SEP] {official[asin]['Price']}"
            for asin in shown
        ]
        assert page.split(" [SEP] Next > [SEP] ")[1] == " [SEP] ".join(records)
