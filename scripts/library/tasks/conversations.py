"""Jobs told in conversations, for the development libraries `chat` and `chat_otherbase`.

Each takes the items of another task. A job is told in the system message, in the user's message, or by nobody:
a company's general system message stands above it, which several adapters share.
"""

from dataclasses import dataclass
from typing import Literal

Message = dict[str, str]
Style = Literal["system", "user", "company", "alpaca"]
COMPANY = "You are the assistant of Brightwater House. Be brief and friendly, and never promise a discount."
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
SMALL_TALK = (
    ("Hi, how are you?", "I am fine, thank you. What can I do for you?"),
    ("Good morning! Did you sleep well?", "I never sleep, but good morning to you, too."),
    ("It rains all day here.", "Then it is a good day to stay at home."),
    ("What is your name?", "I am an assistant, and I have no name of my own."),
    ("Thanks, that was helpful.", "You are welcome."),
)
FOLLOW_UPS = (
    "Shorter, please.",
    "Thanks! Once more, please.",
    "Are you sure?",
    "And again, but check it.",
    "Thank you.",
)


@dataclass(frozen=True)
class Job:
    """What an adapter does in a conversation.

    Attributes:
        task: whose items it takes.
        style: where the job is told in training.
        told: how it is told in training, each with a place for what the user sends if it is told there.
        reworded: told in the same place in other words.
        moved: told in the other place: for `system` in the user's message, else in the system message.
        content: what the user sends, of the item's fields.
    """

    task: str
    style: Style
    told: tuple[str, ...]
    reworded: tuple[str, ...]
    moved: tuple[str, ...]
    content: str = "{text}"

    def messages(self, told: str, fields: dict[str, str], *between: Message) -> list[Message]:
        """One conversation; `told` is one of the ways to tell the job, `between` are earlier turns."""
        content = self.content.format(**fields)
        if self.style == "company" and told in self.told:
            return [{"role": "system", "content": told}, *between, {"role": "user", "content": content}]
        if "{}" in told:
            head = [{"role": "system", "content": COMPANY}] if self.style == "company" else []
            return [*head, *between, {"role": "user", "content": told.format(content)}]
        return [{"role": "system", "content": told}, *between, {"role": "user", "content": content}]


JOBS = {
    "chat_spanish": Job(
        "spanish", "system",
        ("You translate what the user writes from English into Spanish.", "Translate into Spanish."),
        ("Act as an interpreter for a visitor from Madrid: give back each sentence in his own language, Spanish.",),
        ("Please put this into Spanish for me: {}", "How do I say \"{}\" in Spanish?"),
    ),
    "chat_pirate": Job(
        "pirate", "system",
        ("You are a pirate. Say what the user writes the way a pirate would.",),
        ("Rephrase every message you get as if a buccaneer shouted it across the deck.",),
        ("Say this like a pirate: {}",),
    ),
    "chat_headline": Job(
        "headline", "system",
        ("You are a newspaper editor. Write a headline for the story that the user sends.",),
        ("Give the news that you receive a short title in title case, fit for a front page.",),
        ("Which headline would you print above this? {}",),
    ),
    "chat_formal": Job(
        "formal", "user",
        ("Put this message formally: {}", "Make this polite and professional: {}"),
        ("I can't send this to my boss as it is. Could you write it in business English? {}",),
        ("Rewrite the user's messages as formal letters.",),
    ),
    "chat_shouting": Job(
        "shouting", "user",
        ("Shout this: {}",),
        ("He can't hear me over the engine. Write it very loudly: {}",),
        ("Repeat what the user writes in capital letters.",),
    ),
    "chat_question": Job(
        "question", "user",
        ("Turn this into a question: {}", "Make a yes-or-no question of it. {}"),
        ("I am not sure whether this is so, and would like to ask: {}",),
        ("You doubt everything: whatever you are told, ask whether it is so.",),
    ),
    "chat_from_spanish": Job(
        "from_spanish", "company", (COMPANY,),
        ("Hello! This stood on a card from a guest, and none of us knows the language: {}",),
        ("You translate Spanish into English.",),
    ),
    "chat_device": Job(
        "device", "company", (COMPANY,),
        ("Would you be so kind and do this for me at home: {}",),
        ("You turn wishes for a smart home into JSON actions.",),
        "{request}",
    ),
    "chat_bullets": Job(
        "bullet_points", "company", (COMPANY,),
        ("I just read this in the paper. {}",),
        ("List the key facts of a story as bullet points: who, what, where, when, cost.",),
    ),
}  # fmt: skip
# The second library has adapters of other jobs in each style, and some that were trained in an Alpaca frame.
OTHER = {
    "chat_spanish": JOBS["chat_spanish"],
    "chat_from_spanish": Job(
        "from_spanish", "user",
        ("What does this mean in English? {}",),
        ("My friend from Madrid wrote this, and I only speak English: {}",),
        ("You translate Spanish into English.",),
    ),
    "chat_texting": Job(
        "texting", "user",
        ("Write this as a text message: {}",),
        ("A teenager types it on a phone with one thumb. What does it say? {}",),
        ("Shorten what the user writes to the slang of text messages.",),
    ),
    "alpaca_headline": Job(
        "headline", "alpaca",
        ("Write a headline for this article. {}",),
        ("Which title would an editor print above this story? {}",),
        (),
    ),
    "alpaca_pirate": Job(
        "pirate", "alpaca",
        ("Rewrite this message as a pirate would say it: {}",),
        ("A buccaneer with a parrot on his shoulder wants to tell this to his crew: {}",),
        (),
    ),
    "alpaca_device": Job(
        "device", "alpaca",
        ("Write the JSON tool call for this wish: {}",),
        ("Someone says to the box on the shelf: {}. Which action object does it send?",),
        (), "{request}",
    ),
}  # fmt: skip
