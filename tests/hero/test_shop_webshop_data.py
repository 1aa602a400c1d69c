"""WebShop on its own data.

Oracle: what the official server makes of these files (its product records, its number of goals),
the ranks of Lucene, and the rewards measured on the official server. The data is not part of this
repository: name its folder in HERO_WEBSHOP_DATA.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shop_helpers import DATA, finish

from hero.envs.webshop import WebShopEnv

pytest.importorskip("Stemmer", reason="the extra webshop is not installed (PyStemmer)")
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no WebShop data in {DATA.name}: set HERO_WEBSHOP_DATA"
)


@pytest.fixture(scope="module")
def env() -> WebShopEnv:
    return WebShopEnv(str(DATA))


def test_goals_are_the_official_ones(env: WebShopEnv) -> None:
    sizes = {split: len(env.tasks(split)) for split in ("test", "dev", "train")}
    assert sizes == {"test": 500, "dev": 1000, "train": 5410}  # "Loaded 6910 goals."


def test_three_goals_of_train_are_held_out_too(env: WebShopEnv) -> None:
    """An option that is listed twice makes equal goals; the shuffle puts three on both sides."""
    goals = {split: [goal(env, task) for task in env.tasks(split)]
             for split in ("test", "dev", "train")}  # fmt: skip
    held_out = {*goals["test"], *goals["dev"]}
    again = [g for g in goals["train"] if g in held_out]
    assert len(again) == 3 and not set(goals["test"]) & set(goals["dev"])
    careful = WebShopEnv(str(DATA), skip_repeated=True)
    kept = [goal(careful, task) for task in careful.tasks("train")]
    assert len(kept) == 5407 and Counter(goals["train"]) - Counter(kept) == Counter(again)


def goal(env: WebShopEnv, task: str) -> tuple[str, str]:
    found = env._shop.goal(task)
    return found.asin, found.instruction


def test_products_are_read_as_the_official_server_does(env: WebShopEnv) -> None:
    shop = env._shop
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


def test_search_ranks_as_lucene_does(env: WebShopEnv) -> None:
    """Its first hit and its fifty of 1,500 queries; `python -m benchmarks.webshop_search` took the
    digest of Lucene's. Within the fifty, ties in the last digit of a score stand in another order.
    """
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "webshop-search.json"
    said = json.loads(results.read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for found in env._shop.goals[: said["instructions"]]:
        ids = list(env._shop.search(found.instruction))
        digest.update(f"{ids[:1]} {sorted(ids)}\n".encode())
    assert digest.hexdigest() == said["lucene_sha256"]


def test_oracle_earns_what_it_earns_on_the_official_server(env: WebShopEnv) -> None:
    rewards = []
    for task in env.tasks("test")[:200]:
        env.reset(task)
        rewards.append(finish(env)[0])
    # The rest asks for colours that the official reward cannot match (see `option_matches`).
    assert sum(rewards) / len(rewards) == pytest.approx(0.995, abs=0.002)
    assert rewards.count(1.0) == 194


def first_hit(with_options: bool) -> Callable[[WebShopEnv], Iterator[str]]:
    """Search the instruction, take the first hit, and the options that the instruction names."""

    def play(env: WebShopEnv) -> Iterator[str]:
        wanted = env._shop.goal(env._task_id or "")
        yield f"search[{wanted.instruction}]"
        yield f"click[{env._shop.search(wanted.instruction.lower())[0]}]"
        for _, value in wanted.options if with_options else ():
            if f"click[{value}]" in env.available_actions():
                yield f"click[{value}]"
        yield "click[Buy Now]"

    return play


def at_random(env: WebShopEnv) -> Iterator[str]:
    rng = random.Random(env._task_id)
    while True:
        yield env.random_action(rng)


@pytest.mark.parametrize(
    ("policy", "mean", "success"),
    [(at_random, 0.018, 0.0), (first_hit(False), 0.55, 0.017), (first_hit(True), 0.76, 0.51)],
    ids=["random", "first_hit", "first_hit_with_options"],
)
def test_simple_buyers_earn_what_they_earn_on_the_official_server(
    env: WebShopEnv, policy: Callable[[WebShopEnv], Iterator[str]], mean: float, success: float
) -> None:
    rewards = []
    for task in env.tasks("dev"):  # a thousand goals: with 200 chance alone moves it by 0.03
        env.reset(task)
        reward = 0.0
        for action in policy(env):
            _, reward, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
        rewards.append(reward)
    assert sum(rewards) / len(rewards) == pytest.approx(mean, abs=0.03)
    assert rewards.count(1.0) / len(rewards) == pytest.approx(success, abs=0.03)


def test_strict_results_page_shows_the_official_records() -> None:
    lines = (DATA / "documents_1k.jsonl").read_text(encoding="utf-8").splitlines()
    official = {(document := json.loads(line))["id"]: document["product"] for line in lines}
    env = WebShopEnv(str(DATA), prompt="official")
    assert env.system_prompt == ""
    for task in env.tasks("test")[:20]:
        env.reset(task)
        page, _, _, _, info = env.step(env.oracle())
        shown = [name for name in (a[6:-1] for a in info["available_actions"]) if name in official]
        records = [
            f"{asin} [SEP] {official[asin]['Title'].strip()} [SEP] {official[asin]['Price']}"
            for asin in shown
        ]
        assert page.split(" [SEP] Next > [SEP] ")[1] == " [SEP] ".join(records)


def test_an_index_on_disk_is_the_same_shop(env: WebShopEnv, tmp_path: Path) -> None:
    disk = WebShopEnv(str(DATA), index_dir=str(tmp_path / "index"))
    assert list(disk._shop.asins) == list(env._shop.asins)
    assert [disk._shop.goals[i] for i in range(6910)] == list(env._shop.goals)
    assert disk._shop.repeated == env._shop.repeated
    for task in env.tasks("test")[:100]:
        instruction = env._shop.goal(task).instruction
        assert disk._shop.search(instruction) == env._shop.search(instruction)


def test_a_step_takes_less_than_a_millisecond_and_instances_share_the_catalogue() -> None:
    envs = [WebShopEnv(str(DATA)) for _ in range(64)]
    assert all(other._shop is envs[0]._shop for other in envs)
    steps, start = 0, time.process_time()
    for env, task in zip(envs * 2, envs[0].tasks("train"), strict=False):
        env.reset(task)
        for action in first_hit(True)(env):
            env.step(action)
            steps += 1
    assert (time.process_time() - start) / steps < 1e-3
