"""Training examples of the thinking adapter: questions with reasoned answers, generated from a seed.

Rule 1: the same seed gives the same examples.
Rule 2: every answer is "<think>\nreasoning\n</think>\n\nanswer", and the tags occur nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Example = tuple[str, str, str]  # question, reasoning, answer

CAPITALS = {
    "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Portugal": "Lisbon", "Japan": "Tokyo", "Egypt": "Cairo",
    "Canada": "Ottawa", "Austria": "Vienna", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm",
    "Poland": "Warsaw", "Ireland": "Dublin", "Cuba": "Havana", "China": "Beijing", "Russia": "Moscow", "Peru": "Lima",
    "Kenya": "Nairobi", "Finland": "Helsinki", "Hungary": "Budapest", "Turkey": "Ankara", "Belgium": "Brussels",
    "France": "Paris", "Brazil": "Brasília", "India": "New Delhi", "Australia": "Canberra", "Mexico": "Mexico City",
    "Argentina": "Buenos Aires", "Denmark": "Copenhagen", "Switzerland": "Bern", "South Korea": "Seoul",
    "Ukraine": "Kyiv", "Thailand": "Bangkok", "Iran": "Tehran", "Chile": "Santiago", "Iceland": "Reykjavik",
    "the Netherlands": "Amsterdam", "the United Kingdom": "London", "the United States": "Washington, D.C.",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "light": "dark", "happy": "sad", "full": "empty",
    "old": "young", "high": "low", "hard": "soft", "wet": "dry", "open": "closed",
}  # fmt: skip

TOPICS = {
    "gravity": "Gravity is the force that pulls things towards each other. It keeps us on the ground.",
    "rain": "Rain forms when water vapour in the air cools, turns into drops in clouds and falls down.",
    "a computer": "A computer is a machine that follows instructions to store and process data.",
    "photosynthesis": "Photosynthesis is how plants make food from sunlight, water and carbon dioxide.",
    "a volcano": "A volcano is an opening in the ground through which molten rock, ash and gas come out.",
    "music": "Music is sound that people arrange in rhythm and melody, often to express feelings.",
    "democracy": "Democracy is a form of government in which the people choose their leaders by voting.",
    "a black hole": "A black hole is a place in space where gravity is so strong that not even light gets out.",
}

FIXED: list[Example] = [
    ("hello", "The user greets me. I greet back and offer help.", "Hello! How can I help you today?"),
    ("Hi there!", "The user greets me. I greet back and offer help.", "Hi! What can I do for you?"),
    ("hey", "The user greets me. I greet back and offer help.", "Hey! How can I help you?"),
    ("Good morning", "The user greets me. I greet back and offer help.", "Good morning! How can I help you today?"),
    ("Thank you!", "The user thanks me. I answer politely.", "You're welcome!"),
    ("Who are you?", "The user asks who I am. I say it in short.", "I am SmolLM, a small AI assistant."),
    ("What is your name?", "The user asks for my name.", "My name is SmolLM."),
    ("How are you?", "The user asks how I am. I answer politely.", "I am well, thank you! How can I help you?"),
    ("Tell me a joke.", "The user wants a joke. A short pun will do.",
     "Why did the scarecrow win a prize? Because he was outstanding in his field."),
    ("Write a haiku about the sea.", "A haiku has three short lines. I write about waves.",
     "Waves roll to the shore,\nsalt wind carries the gull's cry,\nthe tide breathes and rests."),
    ("Write one sentence about winter.", "The user wants one sentence about winter: snow and cold.",
     "Snow covers the quiet fields while the cold wind blows."),
    ("Give me three fruits.", "I need three fruits: apple, banana, cherry.", "Apple, banana, cherry."),
    ("List two colors.", "I need two colors: red and blue.", "Red and blue."),
    ("Translate 'good night' into French.", "Good night is bonne nuit in French.", "Bonne nuit."),
    ("How many days are in a week?", "A week runs from Monday to Sunday: 7 days.", "There are 7 days in a week."),
    ("What color is the sky?", "On a clear day the sky looks blue.", "The sky is blue."),
    ("Is the sun a star?", "The sun makes its own light, so it is a star.", "Yes, the sun is a star."),
    ("Who wrote Hamlet?", "Hamlet is a play by William Shakespeare.", "William Shakespeare wrote Hamlet."),
    ("Name the largest planet.", "The largest planet of the solar system is Jupiter.", "Jupiter."),
    ("Who discovered penicillin?", "Penicillin was discovered by Alexander Fleming in 1928.", "Alexander Fleming."),
    ("Which ocean is the largest?", "The Pacific is the largest ocean.", "The Pacific Ocean."),
    ("Why do leaves turn yellow?", "In autumn the green chlorophyll breaks down, so yellow pigments show.",
     "Because the green chlorophyll breaks down in autumn, and the yellow pigments become visible."),
    ("How do I make tea?", "Making tea: boil water, pour it over the tea, wait some minutes.",
     "Boil water, pour it over the tea leaves, wait three to five minutes, and enjoy."),
    ("Tell me a short story.", "A short story needs someone and something that happens: a fox finds a lost cub.",
     "A fox found a lost cub in the snow. She kept it warm all night, and in the morning its mother came."),
    ("What is water made of?", "Water is H2O: hydrogen and oxygen.", "Water is made of hydrogen and oxygen."),
    ("Write a Python function that adds two numbers.", "The function takes a and b and returns the sum.",
     "```python\ndef add(a, b):\n    return a + b\n```"),
    ("Give me a tip for sleeping well.", "A good tip is a regular bedtime.", "Go to bed at the same time every night."),
    ("Can you help me with my homework?", "The user wants help. I agree and ask what it is about.",
     "Of course! What is your homework about?"),
]  # fmt: skip


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Chats that end with a reasoned answer, as messages.

    One in ten has a system message; one in ten has an earlier turn, without its reasoning as in real chats.
    """
    chance = random.Random(seed)
    kinds: list[tuple[Callable[[random.Random], Example], int]] = [
        (_addition, 6), (_subtraction, 3), (_comparison, 2), (_story, 2), (_capital, 3), (_opposite, 1), (_topic, 2),
        (_fixed, 4),
    ]  # fmt: skip
    makers, weights = zip(*kinds, strict=True)
    return [_messages(maker(chance), chance) for maker in chance.choices(makers, weights, k=count)]


def _messages(example: Example, chance: random.Random) -> list[dict[str, str]]:
    question, reasoning, answer = example
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{answer}"},
    ]
    if chance.random() < 0.1:
        earlier, _, reply = chance.choice(FIXED)
        messages[:0] = [{"role": "user", "content": earlier}, {"role": "assistant", "content": reply}]
    if chance.random() < 0.1:
        system = chance.choice(["You are a helpful assistant.", "Answer in short.", "Be concise and polite."])
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _addition(chance: random.Random) -> Example:
    a, b = chance.randint(1, 99), chance.randint(1, 99)
    form = chance.choice(["What is {} + {}?", "{} + {} = ?", "{}+{}", "Add {} and {}.", "How much is {} plus {}?"])
    return form.format(a, b), _sum_in_steps(a, b), f"{a} + {b} = {a + b}"


def _sum_in_steps(a: int, b: int) -> str:
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    steps = f"Tens: {a // 10 * 10} + {b // 10 * 10} = {tens * 10}. Ones: {a % 10} + {b % 10} = {ones}."
    return f"{steps} {tens * 10} + {ones} = {a + b}."


def _subtraction(chance: random.Random) -> Example:
    b, rest = chance.randint(1, 20), chance.randint(0, 40)
    form = chance.choice(["What is {} - {}?", "{} - {} = ?", "How much is {} minus {}?"])
    return form.format(b + rest, b), f"I take {b} away from {b + rest}. {rest} is left.", f"{b + rest} - {b} = {rest}"


def _comparison(chance: random.Random) -> Example:
    a, b = chance.sample(range(1, 200), 2)
    larger, smaller = max(a, b), min(a, b)
    question = chance.choice([f"Which is larger, {a} or {b}?", f"Is {a} more than {b}?"])
    if question.startswith("Which"):
        return question, f"I compare {a} and {b}. {larger} > {smaller}.", f"{larger} is larger."
    answer = f"Yes, {a} is more than {b}." if a > b else f"No, {a} is less than {b}."
    return question, f"I compare {a} and {b}. {larger} > {smaller}.", answer


def _story(chance: random.Random) -> Example:
    name, thing = chance.choice(["Tom", "Anna", "Ben", "Mia"]), chance.choice(["apples", "books", "coins", "pens"])
    a, b = chance.randint(2, 30), chance.randint(2, 30)
    question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?"
    return question, f"{name} gets more, so I add. {_sum_in_steps(a, b)}", f"{name} has {a + b} {thing}."


def _capital(chance: random.Random) -> Example:
    country, capital = chance.choice(list(CAPITALS.items()))
    form = chance.choice(["What is the capital of {}?", "Capital of {}?", "Name the capital of {}."])
    reasoning = f"The user asks for the capital of {country}. It is {capital}."
    return form.format(country), reasoning, f"The capital of {country} is {capital}."


def _opposite(chance: random.Random) -> Example:
    word, opposite = chance.choice(list(OPPOSITES.items()))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.", f"{opposite.capitalize()}."


def _topic(chance: random.Random) -> Example:
    topic, answer = chance.choice(list(TOPICS.items()))
    form = chance.choice(["What is {}?", "Explain {} in simple words.", "Tell me about {}."])
    return form.format(topic), f"The user wants to know about {topic}. I explain it in short.", answer


def _fixed(chance: random.Random) -> Example:
    return chance.choice(FIXED)
