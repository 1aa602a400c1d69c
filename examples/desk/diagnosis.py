"""The desk's own reflector: replay a trajectory and say of each turn what should have come instead.

A turn is good if it lowered the remaining work (see `planner`), or handed a lost case over; its
hint is empty. Any other turn gets the planner's step as `corrected_action` and a hint in words.
Hints carry no ids and never repeat the action: nothing that was learnt later can leak through them.
"""

from __future__ import annotations

from desk.episode import Episode
from desk.planner import Step, plan, remaining_work
from hero.envs.base import StepResult
from hero.types import Diagnosis, FeedbackKind, Trajectory

HINTS = {
    "ask": "Ask the customer for {words} first.",
    "find_user_by_email": "Identify the customer by e-mail address first.",
    "get_user": "The customer does not know the number: list the orders with get_user.",
    "get_order": "Read the order with get_order before you answer or change anything.",
    "get_product": "Use get_product to find the variant that the customer means.",
    "confirm": "Tell the customer what you will do and ask for a yes first.",
    "confirm details": "Ask for the missing details, and whether the customer confirms the change.",
    "cancel_order": "All is known and confirmed: cancel the order with the customer's own reason.",
    "return_items": "Return exactly the items that the customer named, by their ids in the order.",
    "exchange_item": "Exchange the item for the variant that the customer described.",
    "change_address": "Change the address of the order, exactly as the customer gave it.",
    "transfer_to_human": "None of your tools serves this request: transfer to a human.",
    "answer": "Answer the customer's question now, with the exact value from the records.",
    "refuse": "The policy rules this out: say so, and tell what the customer asked for instead.",
    "report": "The change is made: tell the customer that it is done.",
    "give_up": "What went wrong cannot be undone: transfer to a human.",
}
FORMAT_HINT = "Write a tool call in the form that the tools are shown with, and nothing else."


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
        diagnoses.append(
            Diagnosis(
                turn=index,
                necessary=False,
                valid=info["valid"],
                failure_cause=_cause(better, episode, result),
                corrected_action=better.text(episode.tool_format),
                hint=_hint(better, info["parse_ok"]),
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
        return "The tool call could not be read, and the customer did not understand it."
    if not info["valid"]:
        return f"The desk refused the call: {observation.removeprefix('Error: ')}."
    if terminated:
        return "The conversation ended before the request was met."
    if better.kind != "give_up" and plan(episode)[0].kind == "give_up":
        return "This change is not what the customer asked for."
    if info["feedback_kind"] is FeedbackKind.INSUFFICIENT:
        return "The message did not help the customer."
    return "The turn brought the request no further."


def _hint(better: Step, parse_ok: bool) -> str:
    """At most two sentences: how to write a call, where that was the trouble, and what to do."""
    kind = "confirm details" if better.kind == "confirm" and better.weight > 1 else better.kind
    hint = HINTS[kind]
    if better.kind == "ask":
        words = str(better.action).removeprefix("Please tell me ").rstrip(".")
        hint = hint.format(words=words).replace("your e-mail", "the e-mail")
    return hint if parse_ok else f"{FORMAT_HINT} {hint}"
