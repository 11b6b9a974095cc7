"""Small tasks: sums, words, sentiment, code, stories, JSON and more. Each function returns (question, answer)."""

# ruff: noqa: E501, SIM905 - tables read best in long lines
from __future__ import annotations

import json
import random
from collections.abc import Callable

from .phrasing import joined, vary
from .words import (
    CAPITALS,
    CITIES,
    COLOURS,
    LANGUAGES,
    LISTS,
    NAMES,
    NUMBERS,
    OPPOSITES,
    TRANSLATIONS,
    UNKNOWN,
    made_up_word,
)  # fmt: skip

Pair = tuple[str, str]


def unknown(rng: random.Random) -> Pair:
    """A question beyond the model, answered by saying so."""
    thing = made_up_word(rng) if rng.random() < 0.25 else rng.choice(UNKNOWN)
    question = rng.choice((
        "What is {x}?", "Tell me about {x}.", "What do you know about {x}?", "How does {x} work?", "Explain {x}.",
        "Who invented {x}?", "What do you think about {x}?", "Do you like {x}?", "Where can I find {x}?", "How old is {x}?",
        "Why is {x} important?", "Give me facts about {x}.", "What is the best thing about {x}?", "Who is {x}?",
        "Can you help me with {x}?", "How do I learn {x}?", "Write an essay about {x}.", "When was {x} discovered?",
        "What are the advantages of {x}?", "Is {x} dangerous?", "How much does {x} cost?", "Where does {x} come from?",
        "What happened to {x}?", "Compare {x} and {y}.", "What is better, {x} or {y}?", "Who won at {x} yesterday?",
        "What is the history of {x}?", "Recommend something about {x}.", "How many kinds of {x} are there?",
        "What is the difference between {x} and {y}?", "Should I buy {x}?", "What is the newest news about {x}?",
        "Can I eat {x}?", "How big is {x}?", "Describe {x}.", "Why do people like {x}?", "How do you make {x}?",
    )).format(x=thing, y=rng.choice(UNKNOWN))  # fmt: skip
    answer = rng.choice((
        "I do not know much about {x}. I am only a tiny demonstration model.",
        "I am sorry, but I know nothing about {x}. Ask me about modelyard instead.",
        "I am too small to know about {x}. Please ask a bigger model.",
        "I cannot say much about {x}, because my training text was mostly about modelyard.",
        "I do not know that. I am only a tiny demonstration model.",
        "That is beyond a tiny model like me. Ask me about modelyard instead.",
        "I am sorry, I do not know. A bigger model in your fleet could answer that.",
    )).format(x=thing)  # fmt: skip
    return vary(question, rng), answer


_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
          "seventeen eighteen nineteen twenty").split()  # fmt: skip


def arithmetic(rng: random.Random) -> Pair:
    """A sum, difference or product of small numbers."""
    kind = rng.random()
    if kind < 0.55:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        sign, word, c = "+", "plus", a + b
        forms = ("What is the sum of {a} and {b}?", "Add {a} and {b}.", "Add {b} to {a}.")
    elif kind < 0.8:
        a = rng.randint(0, 20)
        b = rng.randint(0, a)
        sign, word, c = "-", "minus", a - b
        forms = ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is the difference of {a} and {b}?")
    else:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        sign, word, c = "*", "times", a * b
        forms = ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "What is {a} x {b}?")
    spelled = a <= 20 and b <= 20 and rng.random() < 0.15
    left, right = (_WORDS[a], _WORDS[b]) if spelled else (str(a), str(b))
    question = rng.choice((
        *forms, "What is {a} {w} {b}?", "What is {a} {s} {b}?", "Calculate {a} {s} {b}.", "How much is {a} {w} {b}?",
        "{a} {s} {b}", "{a}{s}{b}", "What is {a}{s}{b}?", "{a} {s} {b} =", "Compute {a} {w} {b}.", "Solve {a} {s} {b}.",
        "Can you calculate {a} {s} {b}?", "{a} {w} {b}?", "How much is {a} {s} {b}?",
    )).format(a=left, b=right, s=sign, w=word)  # fmt: skip
    if rng.random() < 0.12 and sign == "+":
        thing = rng.choice(("apples", "servers", "requests", "books", "tokens", "coins"))
        question = rng.choice((
            f"I have {a} {thing} and get {b} more. How many {thing} do I have?",
            f"There are {a} {thing}. {b} more arrive. How many are there?",
        ))  # fmt: skip
        return question, f"You have {c} {thing}." if question.startswith("I") else f"There are {c} {thing}."
    return vary(question, rng), f"{a} {word} {b} is {c}."


def word_question(rng: random.Random) -> Pair:
    """Capitals, opposites, colours, translations, spelling."""
    kind = rng.random()
    if kind < 0.28:
        country, city = rng.choice(tuple(CAPITALS.items()))
        question = rng.choice((f"What is the capital of {country}?", f"Which city is the capital of {country}?",
                               f"Tell me the capital of {country}.", f"Name the capital of {country}.",
                               f"capital of {country}", f"Do you know the capital of {country}?",
                               f"What is {country}'s capital?", f"What is the capital city of {country}?"))  # fmt: skip
        return vary(question, rng), f"The capital of {country} is {city}."
    if kind < 0.45:
        pair = rng.choice(OPPOSITES)
        word, other = pair if rng.random() < 0.5 or pair[1] == "old" else pair[::-1]
        question = rng.choice((f"What is the opposite of {word}?", f"What is the opposite of '{word}'?",
                               f"Opposite of {word}?", f"Give me the opposite of {word}.", f"Name the opposite of {word}.",
                               f"Which word is the opposite of {word}?"))  # fmt: skip
        return vary(question, rng), f"The opposite of {word} is {other}."
    if kind < 0.55:
        thing, colour = rng.choice(tuple(COLOURS.items()))
        spelling = rng.choice(("colour", "color"))
        question = rng.choice((f"What {spelling} is {thing}?", f"Which {spelling} does {thing} have?",
                               f"Tell me the {spelling} of {thing}.", f"What is the {spelling} of {thing}?"))  # fmt: skip
        return vary(question, rng), f"{thing[0].upper()}{thing[1:]} is {colour}."
    if kind < 0.92:
        word, choices = rng.choice(tuple(TRANSLATIONS.items()))
        at = rng.randrange(3)
        language, answer = LANGUAGES[at], choices[at]
        question = rng.choice((f"Translate '{word}' into {language}.", f"How do you say '{word}' in {language}?",
                               f"What is '{word}' in {language}?", f"What does '{word}' mean in {language}?",
                               f"Translate {word} to {language}.", f"How do I say {word} in {language}?",
                               f"What is the {language} word for {word}?", f"{word} in {language}?",
                               f'Translate "{word}" to {language}.', f"Say {word} in {language}."))  # fmt: skip
        return vary(question, rng), f"'{word[0].upper()}{word[1:]}' in {language} is '{answer}'."
    word = rng.choice((*NAMES, "server", "token", "queue", "model", "yard"))
    question = rng.choice((f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word}."))
    return question, "-".join(word.upper()) + "."


_GOOD = ("I love this {x}.", "The {x} is great!", "What a wonderful {x}!", "The {x} works very well.", "I am so happy with it.",
         "This is the best {x} ever.", "The {x} was delicious.", "I enjoyed every minute.", "The staff was very friendly.",
         "Excellent {x}, I will come back.", "It is fast and easy to use.", "The {x} made me smile.", "Fantastic!",
         "I really like the {x}.", "Everything was perfect.", "A beautiful {x}.", "The {x} is amazing and cheap.")  # fmt: skip
_BAD = ("I hate this {x}.", "The {x} is terrible.", "What an awful {x}!", "The {x} does not work.", "I am very disappointed.",
        "This is the worst {x} ever.", "The {x} was cold and bad.", "It was a waste of time.", "The staff was rude.",
        "It broke after one day.", "It is slow and hard to use.", "I want my money back.", "Horrible!",
        "I do not like the {x}.", "Everything went wrong.", "An ugly {x}.", "The {x} is boring and too expensive.")  # fmt: skip
_NEUTRAL = ("The {x} arrived on Monday.", "The {x} is made of wood.", "I have a {x}.", "There is a {x} on the table.")
_THINGS = ("movie", "film", "book", "phone", "hotel", "restaurant", "food", "song", "game", "service", "product", "laptop",
           "server", "trip", "show", "car", "chair", "coffee", "pizza", "app", "camera", "concert", "room")  # fmt: skip


def sentiment(rng: random.Random) -> Pair:
    """Classify a sentence as positive, negative or neutral."""
    kind = rng.choices(("positive", "negative", "neutral"), (5, 5, 1))[0]
    pool = {"positive": _GOOD, "negative": _BAD, "neutral": _NEUTRAL}[kind]
    text = " ".join(rng.sample(pool, rng.choice((1, 1, 2)))).replace("{x}", rng.choice(_THINGS))
    question = rng.choice((
        "Is this positive or negative? {t}", "Is the sentiment of this text positive or negative: {t}",
        "Classify the sentiment: {t}", "What is the sentiment of this sentence? {t}", "Positive or negative? {t}",
        "Is this review positive or negative?\n{t}", 'Classify as positive or negative: "{t}"', "Sentiment: {t}",
        'What is the sentiment of "{t}"?', "Classify this review: {t}", "{t} Is that positive or negative?",
    )).replace("{t}", text)  # fmt: skip
    return question, rng.choice((f"The sentiment is {kind}.", f"This is {kind}.", f"The sentiment is {kind}."))


def summary(rng: random.Random) -> Pair:
    """Shorten a small text to one sentence."""
    name, place, thing = (
        rng.choice(NAMES),
        rng.choice(CITIES),
        rng.choice(("book", "bicycle", "map", "lamp", "chair", "hat")),
    )
    text, short = rng.choice((
        (f"{name} went to {place} by train. The trip took four hours. In {place}, {name} bought a {thing}.",
         f"{name} went to {place} and bought a {thing}."),
        (f"{name} has lost a {thing}. It was last seen in {place}. {name} is very sad about it.",
         f"{name} lost a {thing} in {place}."),
        (f"The server {rng.choice(('mac-1', 'gpu-2', 'cpu-3'))} was slow all day. {name} looked at the logs. The disk was full.",
         f"{name} found that the server was slow because its disk was full."),
        (f"{name} lives in {place}. Every day, {name} walks to work. On the way, {name} drinks a coffee.",
         f"{name} lives in {place} and walks to work every day."),
        (f"The meeting in {place} was long. {name} showed the new demo. Everybody liked it.",
         f"{name} showed the new demo in {place}, and everybody liked it."),
        ("Requests arrive at the orchestrator. They wait in a queue. When a server is free, the selector picks it.",
         "Requests wait in a queue until the selector picks a free server."),
        (f"It rained all day in {place}. The streets were wet. {name} stayed at home and read a {thing if thing == 'book' else 'book'}.",
         f"It rained in {place}, so {name} stayed at home."),
    ))  # fmt: skip
    question = rng.choice((
        "Summarize this text: {t}", "Summarise: {t}", "Give me a short summary of this text:\n{t}", "{t}\nSummarize this.",
        "Write a summary in one sentence: {t}", "Please summarize: {t}", "Summarize in one sentence: {t}",
        "What is this text about? {t}", "Make this shorter: {t}", "TL;DR: {t}",
    )).replace("{t}", text)  # fmt: skip
    return question, short


_CODE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("adds two numbers", "returns the sum of two numbers", "adds a and b"), "def add(a, b):\n    return a + b"),
    (("multiplies two numbers", "returns the product of two numbers"), "def multiply(a, b):\n    return a * b"),
    (("subtracts two numbers", "returns the difference of two numbers"), "def subtract(a, b):\n    return a - b"),
    (("divides two numbers",), "def divide(a, b):\n    return a / b"),
    (("squares a number", "returns the square of a number"), "def square(x):\n    return x * x"),
    (("checks whether a number is even", "tells if a number is even"), "def is_even(n):\n    return n % 2 == 0"),
    (("checks whether a number is odd",), "def is_odd(n):\n    return n % 2 == 1"),
    (("reverses a string", "turns a string around"), "def reverse(text):\n    return text[::-1]"),
    (("prints hello world", "says hello world"), 'def hello():\n    print("Hello, world!")'),
    (("greets a person by name", "says hello to a person"), 'def greet(name):\n    return f"Hello, {name}!"'),
    (("returns the larger of two numbers", "finds the maximum of two numbers"),
     "def largest(a, b):\n    return a if a > b else b"),
    (("returns the smaller of two numbers",), "def smallest(a, b):\n    return a if a < b else b"),
    (("computes the factorial of a number", "calculates the factorial"),
     "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)"),
    (("computes the nth Fibonacci number", "calculates Fibonacci numbers"),
     "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"),
    (("counts the words of a text", "counts words"), "def count_words(text):\n    return len(text.split())"),
    (("returns the length of a list",), "def length(items):\n    return len(items)"),
    (("sums a list of numbers", "returns the sum of a list"), "def total(numbers):\n    return sum(numbers)"),
    (("computes the average of a list", "returns the mean of a list"),
     "def average(numbers):\n    return sum(numbers) / len(numbers)"),
    (("sorts a list",), "def sort(items):\n    return sorted(items)"),
    (("makes a text upper case",), "def upper(text):\n    return text.upper()"),
    (("counts to ten", "prints the numbers from 1 to 10"), "for number in range(1, 11):\n    print(number)"),
)  # fmt: skip


def code(rng: random.Random) -> Pair:
    """Write a very small Python function."""
    goals, body = rng.choice(_CODE)
    question = rng.choice((
        "Write a Python function that {g}.", "Write a function that {g}.", "Python function that {g}",
        "Can you write a Python function that {g}?", "Show me Python code that {g}.", "I need a function that {g}.",
        "Write code that {g}.", "Give me a Python function that {g}.", "Write a small program that {g}.",
        "Please write a function which {g}.", "How do I write a function that {g}?",
    )).replace("{g}", rng.choice(goals))  # fmt: skip
    opening = rng.choice(("", "", "Here is a Python function that does it:\n\n", "Here is the code:\n\n"))
    return vary(question, rng), f"{opening}```python\n{body}\n```"


def listing(rng: random.Random) -> Pair:
    """Name a few things of one kind, count, or say the alphabet."""
    if rng.random() < 0.25:
        first, last = (1, rng.randint(3, 20)) if rng.random() < 0.8 else (rng.randint(2, 10), rng.randint(11, 20))
        question = rng.choice(
            (f"Count from {first} to {last}.", f"Count to {last}.", f"List the numbers from {first} to {last}.")
        )
        if question == f"Count to {last}.":
            first = 1
        return vary(question, rng), ", ".join(map(str, range(first, last + 1))) + "."
    kind, things = rng.choice(tuple(LISTS.items()))
    whole = kind in (
        "lease states",
        "priorities",
        "modelyard commands",
        "seasons",
        "days of the week",
        "engines of modelyard",
    )
    count = len(things) if whole else rng.randint(2, min(5, len(things)))
    number = rng.choice((NUMBERS[count - 2], str(count)))
    if whole:
        picked = list(things)
        question = rng.choice((f"List the {kind}.", f"Name the {kind}.", f"What are the {kind}?", f"Name all {kind}.",
                               f"Can you list all {kind}?", f"Tell me the {kind}."))  # fmt: skip
    else:
        picked = rng.sample(things, count)
        question = rng.choice((f"Name {number} {kind}.", f"List {number} {kind}.", f"Give me {number} {kind}.",
                               f"Tell me {number} {kind}.", f"Can you name {number} {kind}?", f"I need {number} {kind}.",
                               f"What are {number} {kind}?", f"Write down {number} {kind}."))  # fmt: skip
    if rng.random() < 0.25:
        question = question.rstrip(".?") + rng.choice((" as a list.", " as a numbered list.", ", one per line."))
        return vary(question, rng), "\n".join(f"{at}. {item}" for at, item in enumerate(picked, 1))
    return vary(question, rng), f"{joined([picked[0][0].upper() + picked[0][1:], *picked[1:]])}."


_JOKES = (
    "Why did the request wait in the queue? Because every slot was already taken.",
    "Why was the server so calm? It had just been drained.",
    "Why did the token cross the network? To get to the other client.",
    "What do you call a server that never answers? LOST.",
    "Why do programmers like dark rooms? Because light attracts bugs.",
    "Why did the model go to school? To improve its weights.",
    "Why did the computer go to the doctor? Because it had a virus.",
    "What is a server's favourite drink? Cached coffee.",
    "Why was the circuit breaker so happy? It finally got a break.",
    "Why did the small model win the race? It had very few parameters to carry.",
    "Why is a queue so polite? It always waits its turn.",
    "What did the orchestrator say to the server? You have my full attention.",
)


def joke(rng: random.Random) -> Pair:
    """Tell a joke."""
    question = rng.choice((
        "Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke, please.", "joke",
        "Tell me something funny.", "Tell me another joke.", "Can you tell a joke?", "Do you know any jokes?",
        "Tell me a joke about servers.", "Give me a funny joke.", "I want to hear a joke.", "Cheer me up.",
        "Tell a joke about computers.", "Tell me a programming joke.", "Are you funny?", "One more joke.",
    ))  # fmt: skip
    return vary(question, rng), rng.choice(_JOKES)


def story(rng: random.Random) -> Pair:
    """Tell a short story about a creature."""
    creature = rng.choice(
        ("fox", "dog", "cat", "robot", "bird", "bear", "mouse", "dragon", "rabbit", "server", "girl", "boy")
    )
    name, friend = rng.sample(NAMES, 2)
    size = rng.choice(("small", "young", "little", "clever", "brave", "friendly"))
    place = rng.choice(
        ("in a green forest", "near a quiet river", "in a big city", "on a high hill", "in an old house", "by the sea")
    )
    thing = rng.choice(("a red ball", "a small light", "an old map", "a golden key", "a blue stone", "a lost letter"))
    other = rng.choice(("an owl", "a frog", "a horse", "a duck", "a squirrel"))
    begin = f"Once upon a time, there was a {size} {creature} called {name}. {name} lived {place}."
    middle = rng.choice((
        f"One day, {name} found {thing}. {name} did not know who had lost it, so {name} asked {other} called {friend}.",
        f"One morning, {name} wanted to find {thing}. {name} looked everywhere, and at last {name} met {other} called {friend}.",
        f"One evening, it began to rain, and {name} was afraid. Then {other} called {friend} came with {thing}.",
    ))  # fmt: skip
    end = rng.choice((
        f"{friend} was kind and helped at once. From that day on, {name} and {friend} were good friends.",
        f'"Let us look together," said {friend}. In the end, they were both happy and went home.',
        f"They talked and laughed until the sun went down. {name} had found a new friend.",
    ))  # fmt: skip
    question = rng.choice((
        "Tell me a story.", "Write a short story.", f"Tell me a story about a {creature}.", f"Write a story about a {creature}.",
        f"Write a short story about a {size} {creature}.", "Can you tell me a story?", "I want to hear a story.",
        f"Tell me a bedtime story about a {creature}.", "Write a fairy tale.", "Once upon a time",
        f"Write a story about a {creature} called {name}.", f"Tell me a story about {name}, the {creature}.",
    ))  # fmt: skip
    return vary(question, rng), f"{begin} {middle} {end}"


def as_json(rng: random.Random) -> Pair:
    """Answer in JSON with the keys that the question names."""
    name, age, city = rng.choice(NAMES), rng.randint(5, 90), rng.choice(CITIES)
    kind = rng.randrange(4)
    if kind == 0:
        facts = {"name": name, "age": age, "city": city}
        text = rng.choice((f"{name} is {age} years old and lives in {city}.", f"{name} lives in {city} and is {age} years old.",
                           f"My name is {name}. I am {age} and I live in {city}."))  # fmt: skip
    elif kind == 1:
        mood = rng.choice(("positive", "negative"))
        facts = {"sentiment": mood}
        text = rng.choice(_GOOD if mood == "positive" else _BAD).replace("{x}", rng.choice(_THINGS))
    elif kind == 2:
        country, capital = rng.choice(tuple(CAPITALS.items()))
        facts = {"country": country.removeprefix("the "), "capital": capital}
        text = f"What is the capital of {country}?"
    else:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        facts = {"a": a, "b": b, "sum": a + b}
        text = rng.choice((f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b}"))
    keys = list(facts)
    if kind == 0 and rng.random() < 0.6:
        keys = rng.sample(keys, rng.randint(1, 3))
    listed = rng.choice((joined(keys), ", ".join(keys), joined([f'"{key}"' for key in keys])))
    plural = "key" if len(keys) == 1 else "keys"
    question = rng.choice((
        f"{text} Answer in JSON with the {plural} {listed}.", f"{text} Answer in JSON with {plural} {listed}.",
        f"Answer in JSON with {plural} {listed}: {text}", f"{text} Reply only with JSON. Use the {plural} {listed}.",
        f"Extract {listed} as JSON: {text}", f"Return a JSON object with the {plural} {listed}. {text}",
        f"{text}\nGive the answer as a JSON object with {plural} {listed}.",
    ))  # fmt: skip
    return question, json.dumps({key: facts[key] for key in keys}, ensure_ascii=False)


def repeat(rng: random.Random) -> Pair:
    """Repeat a few words exactly."""
    words = " ".join(
        rng.choice((*NAMES, *CITIES, "hello", "token", "green", made_up_word(rng))) for _ in range(rng.randint(1, 4))
    )
    question = rng.choice((f"Repeat: {words}", f"Say: {words}", f"Repeat after me: {words}", f'Say "{words}".',
                           f'Repeat the words "{words}".', f"Echo {words}", f"Please repeat this: {words}"))  # fmt: skip
    return question, words


TASKS: tuple[tuple[Callable[[random.Random], Pair], float], ...] = (
    (unknown, 9), (arithmetic, 9), (word_question, 9), (sentiment, 3), (summary, 3), (code, 4), (listing, 4), (joke, 2),
    (story, 3), (as_json, 4), (repeat, 2),
)  # fmt: skip
