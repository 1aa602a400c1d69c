"""The desk's own reflector: replay a trajectory and say of each turn what should have come instead.

A turn is good if it lowered the remaining work (see `planner`), or handed a lost case over; its
hint is empty. Any other turn gets the planner's step as `corrected_action` and a hint in words.
Hints carry no ids and never repeat the action: nothing that was learnt later can leak through them.
"""

from __future__ import annotations

import zlib

from desk.episode import Episode
from desk.planner import Step, plan, remaining_work
from hero.envs.base import StepResult
from hero.types import Diagnosis, FeedbackKind, Trajectory

HINTS = {
    "ask": (
        "Ask the customer for {words} first.",
        "You still need {words}: ask the customer.",
        "Begin with a question: the customer must tell you {words}.",
    ),
    "find_user_by_email": (
        "Identify the customer by e-mail address first.",
        "Look the customer up with find_user_by_email before anything else.",
        "The customer gave an e-mail address: use it to find the account first.",
    ),
    "get_user": (
        "Look the account up with get_user to find the right order.",
        "The customer does not know the number: list the orders with get_user.",
    ),
    "get_order": (
        "Look the order up first.",
        "Read the order with get_order before you answer or change anything.",
        "Check status and items of the order with get_order first.",
    ),
    "get_product": (
        "Look the product up to see its variants.",
        "Use get_product to find the variant that the customer means.",
    ),
    "confirm": (
        "Tell the customer what you will do and ask for a yes first.",
        "Ask the customer to confirm before you change anything.",
        "A change takes the customer's confirmation: ask for it now.",
    ),
    "confirm details": (
        "Ask the customer for the missing details and for a confirmation.",
        "Details are missing: ask for them, and whether the customer confirms the change.",
    ),
    "cancel_order": (
        "Everything is known and confirmed: cancel the order, with the reason the customer gave.",
        "Call cancel_order now, with the customer's own reason.",
    ),
    "return_items": (
        "Return exactly the items that the customer named, with the ids from the order.",
        "Call return_items now with the ids of the items the customer wants to send back.",
    ),
    "exchange_item": (
        "Exchange the item for the variant that the customer described.",
        "Call exchange_item now, from the ordered item to the variant the customer wants.",
    ),
    "change_address": (
        "Change the address of the order, exactly as the customer gave it.",
        "Call change_address now with the right street, city and zip.",
    ),
    "transfer_to_human": (
        "None of your tools serves this request: transfer the customer to a human.",
        "This is beyond the desk: call transfer_to_human.",
    ),
    "answer": (
        "You have what the customer asked for: tell it.",
        "Answer the customer's question now, with the exact value from the records.",
    ),
    "refuse": (
        "The policy rules this out: say so, and tell what the customer asked for instead.",
        "Refuse the change because of the order's status and give the fact asked for.",
    ),
    "report": (
        "The change is made: tell the customer that it is done.",
        "Nothing is left to do for this request, so report it as done.",
    ),
    "give_up": (
        "What went wrong cannot be undone: transfer the customer to a human.",
        "Do not go on after a change that cannot be taken back, hand over to a human.",
    ),
}
FORMAT_HINTS = (
    "Write a tool call as one JSON object with name and arguments, nothing else.",
    "A tool call must be valid JSON with the keys name and arguments.",
)


def diagnose(episode: Episode, trajectory: Trajectory) -> list[Diagnosis]:
    """One diagnosis a turn; `episode` is a fresh one of the trajectory's task and is used up."""
    diagnoses = []
    for index, turn in enumerate(trajectory.turns):
        if episode.ended:  # turns that the environment never saw: nothing to say about them
            diagnoses.append(Diagnosis(turn=index, source="rules"))
            continue
        better = plan(episode)[0]
        work = remaining_work(episode)
        result = episode.step(turn.action_text)
        if _is_good(better, work, episode, result):
            diagnoses.append(Diagnosis(turn=index, source="rules"))
            continue
        info = result[-1]
        draw = zlib.crc32(f"{trajectory.task_id}/{index}".encode())
        diagnoses.append(
            Diagnosis(
                turn=index,
                necessary=False,
                valid=info["valid"],
                failure_cause=_cause(better, episode, result),
                corrected_action=better.text,
                hint=_hint(better, info["parse_ok"], draw),
                source="rules",
            )
        )
    return diagnoses


def _is_good(better: Step, work: int, episode: Episode, result: StepResult) -> bool:
    _, reward, terminated, _, info = result
    if terminated:
        handed_over = info["role"] == "tool"  # the transfer is the only tool that ends an episode
        return reward == 1.0 or (better.kind == "give_up" and handed_over)
    return bool(info["valid"]) and remaining_work(episode) < work


def _cause(better: Step, episode: Episode, result: StepResult) -> str:
    observation, _, terminated, _, info = result
    if not info["parse_ok"]:
        return "The tool call could not be read and went to the customer as text."
    if not info["valid"]:
        return f"The desk refused the call: {observation.removeprefix('Error: ')}."
    if terminated:
        return "The conversation ended before the request was met."
    if better.kind != "give_up" and plan(episode)[0].kind == "give_up":
        return "This change is not what the customer asked for."
    if info["feedback_kind"] is FeedbackKind.INSUFFICIENT:
        return "The message did not help the customer."
    return "The turn brought the request no further."


def _hint(better: Step, parse_ok: bool, draw: int) -> str:
    """At most two sentences: how to write a call, where that was the trouble, and what to do."""
    kind = "confirm details" if better.kind == "confirm" and better.weight > 1 else better.kind
    templates = HINTS[kind]
    hint = templates[draw % len(templates)]
    if better.kind == "ask":
        hint = hint.format(words=better.text.removeprefix("Please tell me ").rstrip("."))
        hint = hint.replace("your e-mail", "the e-mail")
    return hint if parse_ok else f"{FORMAT_HINTS[draw % len(FORMAT_HINTS)]} {hint}"
