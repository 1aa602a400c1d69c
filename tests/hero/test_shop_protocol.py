"""The shop's protocol: pages, transitions, parsing and feedback.

Oracle: the pages of the official text environment, written out by hand for a hand-made catalogue.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop_helpers import LAMP, oracle_actions, play, write_catalogue

from hero.envs.shop import ShopEnv
from hero.envs.webshop import WebShopEnv
from hero.types import FeedbackKind

OPEN_LAMP = ["search[desk]", f"click[{LAMP.lower()}]"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalogue(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def strict(data_dir: str) -> ShopEnv:
    env = WebShopEnv(data_dir, mode="strict")
    env.reset("test-0")
    return env


@pytest.fixture
def feedback(data_dir: str) -> ShopEnv:
    env = WebShopEnv(data_dir, score_breakdown=True)
    env.reset("test-0")
    return env


def instruction(env: ShopEnv) -> str:
    return str(env.reset("test-0")[1]["instruction"])


def options_of(env: ShopEnv) -> dict[str, str]:
    """What `... with color: a, and cord: b, and size: c, and price ...` names."""
    named = instruction(env).split(" with ")[1].split(", and price")[0]
    return dict(part.split(": ") for part in named.split(", and "))


def test_the_smallest_profile_is_told_nothing() -> None:
    assert ShopEnv("tiny").system_prompt == ""
    assert "click[Buy Now]" in ShopEnv("small").system_prompt


def test_index_page(strict: ShopEnv) -> None:
    page, info = strict.reset("test-0")
    assert page == f"WebShop [SEP] Instruction: [SEP] {info['instruction']} [SEP] Search"
    assert info["task_id"] == "test-0"
    assert info["instruction"].startswith("Find me bright light lamp with color: ")
    assert info["instruction"].endswith(".00 dollars")


def test_results_page(strict: ShopEnv) -> None:
    text = instruction(strict)
    page, reward, info = play(strict, ["search[Desk]"])
    assert page == (
        f"Instruction: [SEP] {text} [SEP] Back to Search [SEP] Page 1 (Total results: 1) [SEP] "
        f"Next > [SEP] {LAMP} [SEP] Bright Desk Lamp [SEP] $12.5"
    )
    assert reward == 0.0
    assert info["available_actions"] == [
        "search[...]",
        "click[Back to Search]",
        "click[Next >]",
        f"click[{LAMP}]",
    ]


def test_results_are_paged_by_ten(strict: ShopEnv) -> None:
    first, _, _ = play(strict, ["search[lamp]"])
    assert "Page 1 (Total results: 12)" in first and "< Prev" not in first
    assert first.count("[SEP] B0000") == 10
    second, _, _ = play(strict, ["click[next >]"])
    assert "Page 2 (Total results: 12) [SEP] < Prev [SEP] Next >" in second
    assert second.count("[SEP] B0000") == 2
    empty, _, info = play(strict, ["click[next >]"])
    assert empty.endswith("Page 3 (Total results: 12) [SEP] < Prev [SEP] Next >") and info["valid"]
    assert play(strict, ["click[< prev]", "click[< prev]"])[0] == first


def test_item_page_hides_what_was_chosen(strict: ShopEnv) -> None:
    text = instruction(strict)
    page, _, _ = play(strict, OPEN_LAMP)
    shades = " [SEP] ".join(f"shade{letter}" for letter in "abcdefghijk")
    sizes = " [SEP] ".join(f"size{letter}" for letter in "abcdefghijkl")
    cords = " [SEP] ".join(f"cord{letter}" for letter in "abcdefghijk")
    assert page == (
        f"Instruction: [SEP] {text} [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] "
        f"red | white [SEP] {shades} [SEP] size [SEP] {sizes} [SEP] cord "
        f"[SEP] red | white [SEP] {cords} [SEP] "
        "Bright Desk Lamp [SEP] Price: $12.5 [SEP] Rating: N.A. [SEP] Description [SEP] Features "
        "[SEP] Reviews [SEP] Buy Now"
    )
    assert play(strict, ["click[sizea]"])[0] == page


def test_detail_pages(strict: ShopEnv) -> None:
    head = f"Instruction: [SEP] {instruction(strict)} [SEP] Back to Search [SEP] < Prev"
    play(strict, OPEN_LAMP)
    assert play(strict, ["click[description]"])[0] == f"{head} [SEP] It shines & glows."
    features = play(strict, ["click[< prev]", "click[features]"])[0]
    assert features == f"{head} [SEP] First point [SEP] Second point"
    assert play(strict, ["click[< prev]", "click[reviews]"])[0] == head


def test_text_rich_marks_buttons_and_clicks(data_dir: str) -> None:
    env = WebShopEnv(data_dir, mode="strict", observation="text_rich")
    text = instruction(env)
    assert env.reset("test-0")[0] == f"WebShop\nInstruction: \n{text}\n[button] Search [button_]\n"
    results = play(env, ["search[desk]"])[0]
    assert results == (
        f"Instruction:\n{text}\n[button] Back to Search [button_]\nPage 1 (Total results: 1)\n"
        f"[button] Next > [button_]\n\n[button] {LAMP} [button_]\nBright Desk Lamp\n$12.5\n"
    )
    item = play(env, [f"click[{LAMP}]", "click[sizeb]", "click[cordc]"])[0]
    assert item.startswith("You have clicked cordc.\nYou have clicked sizeb.\nInstruction:\n")
    assert "  [clicked button] sizeb [clicked button_]\n" in item
    assert "  [button] sizea [button_]\n" in item
    back = play(env, ["click[< prev]"])[0]
    assert f"\n[clicked button] {LAMP} [clicked button_]\n" in back
    assert (
        f"\n[button] {LAMP} [button_]\n" in play(env, ["click[back to search]", "search[desk]"])[0]
    )


def test_final_page(strict: ShopEnv) -> None:
    wanted = options_of(strict)
    page, _, _ = play(strict, [*OPEN_LAMP, f"click[{wanted['size']}]", "click[buy now]"])
    assert page.startswith(
        "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk "
        f'interface.) [SEP] Purchased [SEP] asin [SEP] {LAMP} [SEP] options [SEP] {{"size": '
    )
    # One attribute, one of three options and the price: 3 of 5.
    assert page.endswith("Your score (min 0.0, max 1.0) [SEP] 0.6 [SEP] Reward Details [SEP] None")


@pytest.mark.parametrize(
    "action",
    ["buy", "click[search]", "click[x]", " click[buy now]", "click[ buy now]", "hold[x]", ""],
)
def test_strict_mode_shows_the_same_page_again(strict: ShopEnv, action: str) -> None:
    page, _, _ = play(strict, OPEN_LAMP)
    after, reward, terminated, truncated, info = strict.step(action)
    assert (after, reward, terminated, truncated, info["valid"]) == (page, 0.0, False, False, False)


def test_options_survive_detail_pages_but_not_the_way_back(strict: ShopEnv) -> None:
    wanted = options_of(strict)
    choose = [f"click[{value}]" for value in wanted.values()]
    kept = play(strict, [*OPEN_LAMP, *choose, "click[features]", "click[< prev]", "click[Buy Now]"])
    strict.reset("test-0")
    forgotten = play(strict, [*OPEN_LAMP, *choose, "click[< prev]", OPEN_LAMP[1], "click[Buy Now]"])
    # One attribute and the price of one attribute, three options and the price.
    assert kept[1] == 1.0 and forgotten[1] == pytest.approx(2 / 5)


def test_value_of_two_options_goes_to_the_last(strict: ShopEnv) -> None:
    page, _, _ = play(strict, [*OPEN_LAMP, "click[red | white]", "click[Buy Now]"])
    assert '{"cord": "red | white"}' in page


def test_search_works_on_every_page(strict: ShopEnv) -> None:
    for prefix in ([], ["search[lamp]"], OPEN_LAMP, [*OPEN_LAMP, "click[features]"]):
        strict.reset("test-0")
        assert "Total results: 1)" in play(strict, [*prefix, "search[desk]"])[0]


def test_feedback_line(feedback: ShopEnv) -> None:
    def last_line(*actions: str) -> tuple[str, FeedbackKind]:
        page, _, info = play(feedback, actions)
        return page.rsplit("\n", 1)[-1], info["feedback_kind"]

    kinds = FeedbackKind
    assert last_line("search[zeppelin]") == (
        "No results for 'zeppelin'. Try fewer words.",
        kinds.NO_RESULTS,
    )
    assert last_line("search[desk]", "click[next >]") == ("No more results.", kinds.NO_RESULTS)
    assert last_line("click[ Blue ]") == (
        "Invalid action: click[blue] is not on this page.",
        kinds.INVALID_ACTION,
    )
    assert last_line("I will buy") == (
        "Could not read the action. Write search[words] or click[x].",
        kinds.PARSE_ERROR,
    )
    assert last_line(" search[ desk ] ", OPEN_LAMP[1], "click[sizea]") == (
        "Selected size: sizea.",
        kinds.OK,
    )
    assert last_line("click[Buy Now]")[1] is kinds.INSUFFICIENT


def test_purchase_is_explained_without_naming_the_target(feedback: ShopEnv) -> None:
    feedback.reset("test-0")
    page, reward, info = play(feedback, ["search[lamp 15]", "click[B000000115]", "click[buy now]"])
    # No shared noun: another kind of product, which earns nothing.
    line = page.rsplit("\n", 1)[-1]
    assert line == (
        "attributes 0/1, options 0/3, price too high, another kind of product, times 0 → 0.00"
    )
    assert (reward, info["success"]) == (0.0, False) and LAMP not in page


def test_steps_run_out(data_dir: str) -> None:
    env = WebShopEnv(data_dir, max_steps=4)
    env.reset("test-0")
    seen = [env.step("search[desk]") for _ in range(4)]
    warnings = [observation.rsplit("\n", 1)[-1] for observation, *_ in seen[1:]]
    assert warnings == ["You have 2 steps left.", "You have 1 step left.", "You have 0 steps left."]
    assert [(terminated, truncated) for _, _, terminated, truncated, _ in seen] == [
        *[(False, False)] * 3,
        (False, True),
    ]
    assert seen[1][4]["feedback_kind"] is FeedbackKind.BUDGET
    with pytest.raises(RuntimeError, match="has ended"):
        env.step("search[desk]")


def test_a_purchase_with_the_last_step_is_no_truncation(data_dir: str) -> None:
    env = WebShopEnv(data_dir, max_steps=3)
    env.reset("test-0")
    play(env, OPEN_LAMP)
    assert env.step("click[Buy Now]")[2:4] == (True, False)


def test_info_tells_how_the_action_was_read(feedback: ShopEnv) -> None:
    info = feedback.step(" click[ Back TO Search ] ")[4]
    assert info["executed_action"] == "click[back to search]"
    assert (info["parse_ok"], info["valid"], info["role"]) == (True, False, "user")
    info = feedback.step("thinking ...")[4]
    assert (info["executed_action"], info["parse_ok"], info["valid"]) == (None, False, False)
    assert info["feedback_kind"] is FeedbackKind.PARSE_ERROR and info["success"] is False


def test_compact_style_is_short(data_dir: str) -> None:
    env = ShopEnv("tiny")
    task = env.tasks("train")[0]
    observation, info = env.reset(task)
    words = info["instruction"].split()
    assert observation == "goal " + " ".join(words) and len(words) == 8
    results = play(env, [f"search[{words[0]} {words[1]}]"])[0]
    assert results.startswith("results ") and results.count(" ; ") == 2
    asin = results.split(f"{words[0]} {words[1]} ")[1].split()[0]
    item = play(env, [f"click[{asin}]", f"click[{words[3]}]"])[0]
    assert item.startswith(f"item {words[0]} {words[1]} price ")
    assert item.endswith(f" chosen {words[3]}")
    assert " color " in item and " size " in item and len(item.split()) < 20
    assert play(env, ["click[features]"])[0] == f"features {words[0]} {words[1]}"


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "huge"},
        {"mode": "lenient"},
        {"observation": "html"},
        {"max_steps": 0},
        {"forget": 1.5},
        {"num_products": 0},
        {"profile": "small", "num_products": 5},
        {"profile": "tiny", "num_products": 10_000},
    ],
    ids=str,
)
def test_bad_options_are_told(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ShopEnv(**options)  # type: ignore[arg-type]


def test_unknown_tasks_and_missing_reset() -> None:
    env = ShopEnv("tiny")
    with pytest.raises(RuntimeError, match="reset"):
        env.step("search[shirt]")
    for task_id in ("train-999999", "train", "test--1", "dev-01"):
        with pytest.raises(KeyError, match=task_id):
            env.reset(task_id)
    with pytest.raises(ValueError, match=r"'valid'.*expected"):
        env.tasks("valid")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(max_size=30)
        | st.text(max_size=12).map("search[{}]".format)
        | st.sampled_from(["search[lamp]", "click[next >]", "click[< prev]", "click[b000000001]"])
        | st.text(max_size=12).map("click[{}]".format),
        max_size=6,
    ),
    st.sampled_from(["strict", "feedback"]),
)
def test_no_text_of_an_agent_raises(texts: list[str], mode: str) -> None:
    env = ShopEnv("small", mode=mode)
    page, _ = env.reset("train-1")
    for text in texts:
        before = page
        page, reward, terminated, _, info = env.step(text)
        assert reward == 0.0 and not terminated and info["parse_ok"] is not None
        assert (info["executed_action"] is None) == (not info["parse_ok"])
        if mode == "strict" and not info["valid"]:
            assert page == before


@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_the_breakdown_of_a_score_can_be_left_out(profile: str) -> None:
    pages = []
    for breakdown in (True, False):
        env = ShopEnv(profile, score_breakdown=breakdown)
        actions = oracle_actions(env, "train-4")
        env.reset("train-4")
        pages.append(play(env, actions)[0])
    told, silent = pages
    assert told.startswith(silent.rstrip()) and "price ok" in told
    assert "price ok" not in silent and "1.0" in silent  # the score itself stays
