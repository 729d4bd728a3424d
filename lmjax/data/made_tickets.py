"""A made table of letters to a customer service: synthetic, with as much noise as it says."""

from __future__ import annotations

import numpy as np

TICKETS_HEADER = ("channel", "plan", "months", "message", "topic")
NUM_TICKETS = 4000
WRONG = 0.05  # of the labels are drawn anew from the other topics, so no model passes 0.95

# What each topic is about, and what goes wrong with it.
_TOPICS = {
    "billing": (
        ("my last invoice", "the amount you charged", "my monthly bill", "the tax on my receipt"),
        ("was charged twice", "is higher than agreed", "shows the wrong total", "came too early"),
    ),
    "delivery": (
        ("my parcel", "the package", "my order from monday", "the courier"),
        ("has not arrived", "went to the wrong address", "came damaged", "is stuck at customs"),
    ),
    "login": (
        ("my password", "the sign-in page", "the code you text me", "my account"),
        ("does not work", "is locked after three tries", "was reset without me", "is not accepted"),
    ),
    "technical": (
        ("the app", "your website", "the export button", "the latest update"),
        ("crashes on my phone", "shows an empty page", "is terribly slow", "stops with error 500"),
    ),
    "cancellation": (
        ("my subscription", "my contract", "the trial", "my membership"),
        ("must end this month", "should not renew", "is no longer needed", "has to be closed"),
    ),
    "product": (
        ("the blue model", "the larger size", "the family plan", "the new version"),
        ("is out of stock", "differs from the picture", "lacks a manual", "is too small for us"),
    ),
}
_OPENINGS = ("hello,", "hi there,", "good morning,", "dear team,", "to whom it may concern:", "")
_CLOSINGS = (
    "please help.", "thanks in advance!", "i am waiting for your answer.", "this is urgent!",
    "best regards.", "",
)  # fmt: skip
_TURNS = (
    "i do not write about {other}, but about this: {this} {trouble}.",
    "{this} {trouble}; {other}, by the way, is fine now.",
    "last week you solved {other} for me. now {this} {trouble}.",
    "this time it is not {other}: {this} {trouble}.",
    "first of all, {other} is in order again. but {this} {trouble}.",
)
_PLAIN = ("{this} {trouble}.", "since yesterday {this} {trouble}.", "i must report that {this} "
          "{trouble}.")  # fmt: skip


def make_tickets(*, num_rows: int = NUM_TICKETS, seed: int = 0) -> list[list[str]]:
    """Rows of `TICKETS_HEADER`, the same for the same arguments.

    Half of the messages name a second topic that the letter is not about; which of the two it is,
    the order of the words tells. What goes wrong is, in one message in four, said in words of no
    topic. The plan, the channel and the months say nothing of the topic.
    """
    random = np.random.default_rng(seed)

    def one(of: tuple[str, ...]) -> str:
        return of[int(random.integers(len(of)))]

    names = tuple(_TOPICS)
    rows = []
    for _ in range(num_rows):
        topic = one(names)
        others = tuple(name for name in names if name != topic)
        things, troubles = _TOPICS[topic]
        trouble = one(troubles) if random.random() < 0.75 else one(("is a problem", "is all wrong"))
        turn = one(_TURNS) if random.random() < 0.5 else one(_PLAIN)
        message = turn.format(this=one(things), trouble=trouble, other=one(_TOPICS[one(others)][0]))
        letter = " ".join(part for part in (one(_OPENINGS), message, one(_CLOSINGS)) if part)
        label = one(others) if random.random() < WRONG else topic
        months = str(int(random.integers(1, 120)))
        rows.append(
            [one(("mail", "chat", "phone")), one(("free", "pro", "team")), months, letter, label]
        )
    return rows
