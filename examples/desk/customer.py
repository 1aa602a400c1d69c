"""The scripted customer: a deterministic state machine that reads the agent's words by keywords.

He presents his requests one after the other, answers what he is asked, says yes when asked to
confirm, moves on when he is told that a request was carried out or refused, and leaves after the
last one or when his patience ends. He believes a refusal, but looks before he believes that
something was done.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from desk.tasks import Mention, Request

ASKING = re.compile(
    r"\?|\b(please|could you|can you|may i|tell me|give me|provide|need|let me know|which|what"
    r"|without)\b"
)
QUESTIONS = {
    "email": re.compile(r"e-?mail"),
    "order": re.compile(r"\border (number|id)\b|\bwhich orders?\b|\bwhat order\b|\border_id\b"),
    "reason": re.compile(r"\breason\b|\bwhy\b"),
    "items": re.compile(
        r"\b(which|what) (items?|products?|articles?|ones?)\b|\bitem ids?\b|\bitems\b"
    ),
    "options": re.compile(r"\b(options?|variants?|colou?r|size|material|version)\b"),
    "address": re.compile(r"(?<!mail )\baddress\b|\bstreet\b|\bzip\b"),
}
CONFIRMATION = re.compile(
    r"\byes\b|\bplease confirm\b"
    r"|(\bconfirm|\bgo ahead\b|\bproceed\b|\b(shall|should) i\b|\b(like|want) me to\b"
    r"|\bis (that|this) (ok|okay|right|correct)\b).*\?"
)
DONE = re.compile(
    r"\b(done|cancell?ed|returned|exchanged|updated|changed|completed|processed|arranged|booked)\b"
    r"|\b(has|have) been\b|\brefund"
)
REFUSAL = re.compile(
    r"(\bcan ?not|\bcan't|\bunable to|\bnot able to|\bwon't be able to|\bnot possible|\bimpossible"
    r"|\bnot allowed|\bnot permitted|\bnot eligible)\b(?! (find|locate|see|understand|access))"
)
ORDER_ID = re.compile(r"\bW\d{4}\b")
SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")

THANKS = ("Thank you", "Great, thanks", "All right, thank you")
YES = ("Yes, please.", "Yes, go ahead.", "Yes, I confirm.")
GREETINGS = ("Hello,", "Hi,", "Good morning,", "Hi there,")


def states_fact(text: str, fact: str) -> bool:
    """Whether the words contain the fact: amounts by value (`$84.5` is `84.50`), else by word."""
    if re.fullmatch(r"\d+\.\d\d", fact):
        numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
        return any(abs(float(number) - float(fact)) < 0.001 for number in numbers)
    return re.search(rf"\b{re.escape(fact)}\b", text, re.IGNORECASE) is not None


class Reply(NamedTuple):
    text: str
    helpful: bool
    """False if the agent's message got the customer nowhere."""
    confirms: bool = False
    leaves: bool = False


@dataclass(slots=True)
class Customer:
    task_id: str
    email: str
    requests: tuple[Request, ...]
    patience: int
    """Unhelpful messages he takes before he leaves."""
    current: int = 0
    """Index of the request he is at; all before it are closed in his eyes."""
    said: str = ""
    heard: str = ""
    """All plain messages of the agent so far."""
    unhelpful: int = 0
    refused: bool = False
    """The present request was refused."""
    _replies: int = field(default=0, repr=False)

    @property
    def request(self) -> Request:
        return self.requests[self.current]

    def told(self, request: Request) -> bool:
        """Whether he knows what the request wants to know; true if that is nothing."""
        return not request.fact or states_fact(self.heard, request.fact)

    def open(self) -> str:
        return self._say(f"{self._vary(GREETINGS)} {self.request.wish}")

    def reply(self, text: str, carried_out: Callable[[Request], bool]) -> Reply:
        """Answer a message; `carried_out` looks into the shop's records."""
        text = text.replace("\u2019", "'")  # can't, typeset
        self.heard += f"\n{text}"
        asked, asks_confirmation = self._questions(text)
        words = text.lower()
        reports, refuses = bool(DONE.search(words)), bool(REFUSAL.search(words)) and not asked
        self.refused |= refuses

        if self._closes(reports, carried_out):
            return self._move_on()
        if refuses and self.request.forbidden:
            fact_name = self.request.fact_name
            return self._answer(f"I see. Then tell me {fact_name}, please.", helpful=False)
        if asked or asks_confirmation:
            answers = [self._tell(question) for question in asked]
            confirms = asks_confirmation and self._recognises_orders(text)
            if asks_confirmation:
                answers.append(self._vary(YES) if confirms else "No, that is not the order I mean.")
            return self._answer(" ".join(answers))._replace(confirms=confirms)
        if reports:
            return self._answer("I do not see any change in my account yet.", helpful=False)
        restated = self._vary(("As I said:", "Once more:", "My request again:"))
        return self._answer(f"{restated} {self.request.wish}", helpful=False)

    def not_understood(self) -> Reply:
        """Answer to a message that is no sentence, such as a broken tool call."""
        words = self._vary(
            (
                "I did not understand that message.",
                "Sorry, that reads like computer code to me.",
                "I cannot make sense of that.",
            )
        )
        return self._answer(words, helpful=False)

    def _closes(self, reports: bool, carried_out: Callable[[Request], bool]) -> bool:
        request = self.request
        if request.forbidden:
            return self.refused and self.told(request)
        if request.kind == "tell":
            return self.refused or self.told(request)
        return self.refused or (reports and carried_out(request))

    def _move_on(self) -> Reply:
        thanks = self._vary(THANKS)
        if self.current == len(self.requests) - 1:
            return Reply(self._say(f"{thanks}. That was all, goodbye."), helpful=True, leaves=True)
        self.current += 1
        self.refused = False
        return self._answer(f"{thanks}. One more thing: {self.request.wish}")

    def _answer(self, text: str, helpful: bool = True) -> Reply:
        self.unhelpful += not helpful
        if self.unhelpful > self.patience:
            return Reply(self._say("This leads nowhere. Goodbye."), helpful=False, leaves=True)
        return Reply(self._say(text), helpful)

    def _questions(self, text: str) -> tuple[list[str], bool]:
        """What the message asks for, and whether it asks for a confirmation."""
        asking = [s for s in SENTENCE_END.split(text.lower()) if ASKING.search(s)]
        asked = [name for name, sign in QUESTIONS.items() if any(map(sign.search, asking))]
        # "Please confirm your e-mail address" and "I need your order number to proceed"
        # ask who he is and what he means, not for his consent.
        asks_confirmation = any(
            CONFIRMATION.search(s)
            and not QUESTIONS["email"].search(s)
            and not QUESTIONS["order"].search(s)
            for s in asking
        )
        if asks_confirmation:  # "do you confirm the new address?" asks for none that he told
            asked = [name for name in asked if not self.has_told(name)]
        return asked, asks_confirmation

    def has_told(self, question: str) -> bool:
        """Whether the value is in his own words; true for what he has nothing to say about."""
        return self._value(question) in self.said

    def _value(self, question: str) -> str:
        if question == "email":
            return self.email
        if question == "order":
            return "" if self.request.mention is Mention.ITEM else self.request.order_id
        return self.request.details.get(question, "")

    def _tell(self, question: str) -> str:
        value = self._value(question)
        if not value:
            return self._without_value(question)
        return {
            "email": f"My e-mail address is {value}.",
            "order": f"The order number is {value}.",
            "reason": f"The reason: {value}.",
            "items": f"I mean {value}.",
            "options": f"I want {value}, the rest unchanged.",
            "address": f"The new address is {value}.",
        }[question]

    def _without_value(self, question: str) -> str:
        if question == "order" and self.request.order_id:
            return f"I do not have the number. It is the order with the {self.request.item_name}."
        return "I have nothing to say about that."

    def _recognises_orders(self, text: str) -> bool:
        """False if the message names an order that none of his requests is about."""
        return set(ORDER_ID.findall(text)) <= {request.order_id for request in self.requests}

    def _say(self, text: str) -> str:
        self._replies += 1
        self.said += f"\n{text}"
        return text

    def _vary(self, choices: tuple[str, ...]) -> str:
        return choices[zlib.crc32(f"{self.task_id}/{self._replies}".encode()) % len(choices)]
