"""Chat: two tones, two summarising styles, two translation directions, support intents."""

import random
from collections.abc import Callable, Sequence

from . import Item, Stream, Task, drawn

# One message in four registers; {who}, {thing} and {when} are filled alike in all of them.
_MESSAGES = (
    ("hey {who}, can u send me the {thing} {when}?",
     "Dear {who}, could you please send me the {thing} {when}?",
     "Ahoy {who}, send me the {thing} {when}, arr!",
     "yo {who} snd me da {thing} {when} plz k"),
    ("sorry {who}, i lost the {thing} {when}",
     "Dear {who}, I apologise, but I misplaced the {thing} {when}.",
     "Blimey {who}, I be losin' the {thing} {when}, arr!",
     "{who} soz lost da {thing} {when} lol"),
    ("yo {who}, thx for the {thing} {when}!",
     "Dear {who}, thank you very much for the {thing} {when}.",
     "Avast {who}, ye be a fine mate for the {thing} {when}, arr!",
     "{who} ty 4 da {thing} {when} ur da best"),
    ("{who}, gotta skip the {thing} {when}, my bad",
     "Dear {who}, I regret that I must miss the {thing} {when}.",
     "Shiver me timbers {who}, I be missin' the {thing} {when}, arr!",
     "{who} cant make da {thing} {when} soz"),
    ("hey {who}, wanna check the {thing} {when}?",
     "Dear {who}, would you like to review the {thing} {when}?",
     "Ahoy {who}, cast yer eye on the {thing} {when}, arr!",
     "{who} chk da {thing} {when} ok?"),
    ("omg {who}, the {thing} was so cool {when}",
     "Dear {who}, the {thing} was truly impressive {when}.",
     "Yo ho {who}, the {thing} be a rare treasure {when}, arr!",
     "{who} da {thing} woz gr8 {when} omg"),
)  # fmt: skip
_WHO = "Anna Ben Carla David Ella Frank Grace Hugo Iris Jonas Karin Leo".split()
_THING = (
    "report|invoice|meeting|slides|draft|contract|photos|budget|agenda|recipe|tickets|workshop|survey|"
    "code review|newsletter|phone call"
).split("|")
_WHEN = "today|yesterday|this morning|last night|on Monday|on Friday|after lunch|this week".split("|")


def tone(register: int) -> Stream:
    """Casual messages, and what they are in a register: 0 as they are, 1 formal, 2 a pirate's, 3 a text's."""

    def draw(rng: random.Random) -> Item:
        message = rng.choice(_MESSAGES)
        filling = {"who": rng.choice(_WHO), "thing": rng.choice(_THING), "when": rng.choice(_WHEN)}
        return Item({"text": message[0].format(**filling)}, message[register].format(**filling))

    return drawn(draw)


_ORGS = ("Norwind", "the city council", "Halden Bank", "Orbit Labs", "the museum", "Tessa Foods",
         "the university", "Lumen Energy", "the railway", "Peak Motors", "the library", "Vela Air")  # fmt: skip
_DOES = (("open", "a new factory"), ("close", "an old warehouse"), ("build", "a solar park"),
         ("buy", "a small software firm"), ("launch", "a night bus"), ("test", "electric ferries"),
         ("sell", "its headquarters"), ("renovate", "the old harbour"), ("fund", "a music school"),
         ("cut", "ticket prices"))  # fmt: skip
_CITIES = "Bergen Lyon Porto Leeds Graz Turin Malmo Ghent Cork Basel Gdansk Tampere".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_LEADS = ("a spokesperson said", "according to a statement", "officials confirmed", "the director said")


def _story(rng: random.Random) -> tuple[str, dict[str, str]]:
    verb, thing = rng.choice(_DOES)
    fact = {
        "who": rng.choice(_ORGS), "verb": verb, "thing": thing, "city": rng.choice(_CITIES),
        "day": rng.choice(_DAYS), "cost": str(rng.randint(2, 90)),
    }  # fmt: skip
    lead, who = rng.choice(_LEADS), fact["who"]
    text = (
        f"{who[0].upper()}{who[1:]} will {verb} {thing} in {fact['city']}, {lead} on {fact['day']}. "
        f"The plan costs {fact['cost']} million euros."
    )
    return text, fact


def _headline(rng: random.Random) -> Item:
    text, fact = _story(rng)
    who = fact["who"].removeprefix("the ")
    return Item({"text": text}, f"{who} to {fact['verb']} {fact['thing']} in {fact['city']}".title())


def _bullets(rng: random.Random) -> Item:
    text, fact = _story(rng)
    lines = (
        f"- who: {fact['who'].removeprefix('the ')}", f"- what: {fact['verb']} {fact['thing']}",
        f"- where: {fact['city']}", f"- when: {fact['day']}", f"- cost: {fact['cost']} million",
    )  # fmt: skip
    return Item({"text": text}, "\n".join(lines))


# Who does what to whom, and when; the same in each language.
_WORDS = {
    "English": (
        "the cat|the dog|the teacher|the doctor|my brother|my sister|the girl|the boy|my friend|the farmer",
        "eats|buys|sells|sees|wants|has|brings|looks for",
        "the apple|the bread|the fish|the milk|the book|the house|the key|the car|the letter|the cheese|the hat|the table",
        "today|tomorrow|every day|at night|in the kitchen|in the city|on Monday",
    ),
    "Spanish": (
        "el gato|el perro|el profesor|el doctor|mi hermano|mi hermana|la niña|el niño|mi amigo|el granjero",
        "come|compra|vende|ve|quiere|tiene|trae|busca",
        "la manzana|el pan|el pescado|la leche|el libro|la casa|la llave|el coche|la carta|el queso|el sombrero|la mesa",
        "hoy|mañana|todos los días|por la noche|en la cocina|en la ciudad|el lunes",
    ),
    "French": (
        "le chat|le chien|le professeur|le médecin|mon frère|ma sœur|la fille|le garçon|mon ami|le fermier",
        "mange|achète|vend|voit|veut|a|apporte|cherche",
        "la pomme|le pain|le poisson|le lait|le livre|la maison|la clé|la voiture|la lettre|le fromage|le chapeau|la table",
        "aujourd'hui|demain|tous les jours|la nuit|dans la cuisine|en ville|lundi",
    ),
    "German": (
        "die Katze|der Hund|der Lehrer|der Arzt|mein Bruder|meine Schwester|das Mädchen|der Junge|mein Freund|der Bauer",
        "isst|kauft|verkauft|sieht|will|hat|bringt|sucht",
        "den Apfel|das Brot|den Fisch|die Milch|das Buch|das Haus|den Schlüssel|das Auto|den Brief|den Käse|den Hut|den Tisch",
        "heute|morgen|jeden Tag|nachts|in der Küche|in der Stadt|am Montag",
    ),
}


def words(language: str, numbers: Sequence[int]) -> list[str]:
    """The four parts of a sentence."""
    return [part.split("|")[number] for part, number in zip(_WORDS[language], numbers, strict=True)]


def sentence(parts: Sequence[str], end: str = ".") -> str:
    """Parts as a sentence."""
    text = " ".join(parts)
    return text[0].upper() + text[1:] + end


def sentences(answer: Callable[[list[int]], str], language: str = "English") -> Stream:
    """Sentences in a language; the answer is made from the numbers of their parts."""
    sizes = [part.count("|") + 1 for part in _WORDS[language]]

    def draw(rng: random.Random) -> Item:
        numbers = [rng.randrange(size) for size in sizes]
        return Item({"text": sentence(words(language, numbers))}, answer(numbers))

    return drawn(draw)


def translation(target: str, source: str = "English") -> Stream:
    """Sentences and their translations, word by word."""
    return sentences(lambda numbers: sentence(words(target, numbers)), source)


_INTENTS = {
    "refund": ("I want my money back for the {product}", "please return the payment for the {product} I sent back",
               "the {product} was a mistake, how do I get reimbursed"),
    "delivery": ("where is my {product}, it should have come {when}", "the courier has not brought the {product} yet",
                 "when does the {product} arrive, I ordered it {when}"),
    "damage": ("my {product} came broken", "there is a crack in the {product} I got {when}",
               "the {product} stopped working {when}"),
    "cancel": ("please stop my order of the {product}", "I no longer need the {product} I ordered {when}",
               "do not ship the {product}, I changed my mind"),
    "invoice": ("send me the bill for the {product}", "I need a receipt for the {product} bought {when}",
                "there is a wrong amount on the paperwork for the {product}"),
    "account": ("I forgot my password {when} and cannot see the {product} I bought",
                "how do I change the e-mail address I used for the {product}",
                "please delete my profile, I only bought a {product} {when}"),
    "stock": ("do you have the {product} in blue", "will the {product} be available again soon",
              "is the {product} sold out since {when}"),
    "warranty": ("how many years am I covered for the {product}", "does the guarantee on the {product} from {when} still hold",
                 "I want to extend the protection plan of the {product}"),
}  # fmt: skip
_PRODUCTS = (
    "toaster", "laptop", "sofa", "lamp", "bicycle", "headset", "camera", "kettle", "printer", "watch",
    "tent", "backpack", "monitor", "blender", "heater", "guitar", "drone", "razor", "desk", "carpet",
)  # fmt: skip
_SINCE = ("yesterday", "last week", "on Monday", "in March", "two days ago", "last month")


def _intent(rng: random.Random) -> Item:
    intent = rng.choice(list(_INTENTS))
    text = rng.choice(_INTENTS[intent]).format(product=rng.choice(_PRODUCTS), when=rng.choice(_SINCE))
    # Labels that say nothing by themselves, as in a ticket system: the base can't guess them.
    return Item({"text": text}, _CODES[intent], tuple(_CODES.values()))


_CODES = {intent: f"Q{number}" for number, intent in enumerate(_INTENTS, 1)}

TASKS = (
    Task("formal_tone", "chat", "Rewrites a casual message in a formal tone.", tone(1),
         phrasings=("Rewrite this message in a formal tone: {text}\nFormal:",
                    "Make the following text polite and professional.\n{text}\n->"),
         unseen=("I can't send this to my boss like that: \"{text}\". How would I say it in business English?\n",
                 "Casual version: {text}\nBusiness letter version:")),
    Task("pirate_tone", "chat", "Rewrites a casual message the way a pirate would say it.", tone(2),
         phrasings=("Rewrite this message as a pirate would say it: {text}\nPirate:",),
         unseen=("A buccaneer with a parrot on his shoulder wants to tell this to his crew: \"{text}\". He shouts:",
                 "Casual version: {text}\nPirate speak version:")),
    Task("headline", "chat", "Writes a headline for a short news story.", drawn(_headline),
         phrasings=("{text}\nWrite a headline for this article.\nHeadline:",),
         unseen=("You are the editor of a newspaper. Story: {text} Which title do you print above it?\nTitle:",
                 "News: {text}\nTL;DR as one title line:")),
    Task("bullet_points", "chat", "Summarises a short news story as five bullet points.", drawn(_bullets),
         phrasings=("{text}\nSummarize the article in bullet points.\nSummary:\n",
                    "Article: {text}\nKey facts as a list:\n"),
         unseen=("Please extract who, what, where, when and the cost from this text: {text}\n",
                 "Notes for a briefing, one fact a line, from this story: {text}\nNotes:\n")),
    Task("to_spanish", "chat", "Translates simple English sentences into Spanish.", translation("Spanish"),
         phrasings=("Translate from English to Spanish: {text}\nSpanish:",),
         unseen=("How do they say \"{text}\" in Madrid? They say:",
                 "English: {text}\nEspañol:")),
    Task("from_spanish", "chat", "Translates simple Spanish sentences into English.", translation("English", "Spanish"),
         phrasings=("Translate from Spanish to English: {text}\nEnglish:",
                    "What does this Spanish sentence mean? {text}\nMeaning:"),
         unseen=("My friend from Madrid wrote: \"{text}\" I only speak English. She means:",
                 "Español: {text}\nInglés:")),
    Task("support_intent", "chat", "Sorts a customer's message into one of eight ticket queues.", drawn(_intent),
         phrasings=("Customer: {text}\nTicket queue (Q1 to Q8):",
                    "Route this support request to a queue.\nRequest: {text}\nQueue:"),
         unseen=("Someone writes to our help desk: \"{text}\". Which queue code does the ticket get?\nCode:",
                 "Message received by the shop: {text}\nAssigned to")),
)  # fmt: skip
