"""Word lists for the generated conversations."""

# ruff: noqa: E501, SIM905 - tables read best in long lines
from __future__ import annotations

import random

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Kira", "Leo", "Mia", "Noah",
         "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yara", "Zoe", "Alex", "Maria", "John", "Peter",
         "Lisa", "Tom", "Sarah", "Max", "Nina", "Omar", "Lucy", "Ivan", "Ada", "Alan", "Bob", "Alice")  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "the United Kingdom": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Poland": "Warsaw", "Austria": "Vienna", "Switzerland": "Bern",
    "Greece": "Athens", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "India": "New Delhi",
    "China": "Beijing", "Japan": "Tokyo", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia",
    "Peru": "Lima", "Chile": "Santiago", "Australia": "Canberra", "Russia": "Moscow", "Hungary": "Budapest",
    "the Netherlands": "Amsterdam", "Belgium": "Brussels", "Cuba": "Havana", "Argentina": "Buenos Aires",
    "South Korea": "Seoul", "Thailand": "Bangkok", "the United States": "Washington", "the USA": "Washington",
}  # fmt: skip
CITIES = (*sorted(set(CAPITALS.values())), "New York", "San Francisco", "Hamburg", "Munich", "Boston", "Chicago",
          "Milan", "Porto", "Geneva", "Zurich", "Prague", "Sydney", "Seattle", "Lyon", "Bergen", "Kyoto")  # fmt: skip

OPPOSITES = (("hot", "cold"), ("big", "small"), ("fast", "slow"), ("light", "dark"), ("day", "night"), ("up", "down"),
             ("good", "bad"), ("happy", "sad"), ("old", "new"), ("young", "old"), ("open", "closed"), ("full", "empty"),
             ("hard", "easy"), ("rich", "poor"), ("high", "low"), ("long", "short"), ("left", "right"), ("wet", "dry"),
             ("strong", "weak"), ("true", "false"), ("early", "late"), ("clean", "dirty"), ("loud", "quiet"))  # fmt: skip

COLOURS = {"grass": "green", "snow": "white", "the sky": "blue", "a lemon": "yellow", "a tomato": "red", "coal": "black",
           "a banana": "yellow", "blood": "red", "milk": "white", "an orange": "orange", "a leaf": "green"}  # fmt: skip

TRANSLATIONS = {
    "hello": ("hallo", "bonjour", "hola"), "thank you": ("danke", "merci", "gracias"), "yes": ("ja", "oui", "sí"),
    "no": ("nein", "non", "no"), "please": ("bitte", "s'il vous plaît", "por favor"),
    "good morning": ("guten Morgen", "bonjour", "buenos días"), "goodbye": ("auf Wiedersehen", "au revoir", "adiós"),
    "water": ("Wasser", "eau", "agua"), "bread": ("Brot", "pain", "pan"), "house": ("Haus", "maison", "casa"),
    "tree": ("Baum", "arbre", "árbol"), "dog": ("Hund", "chien", "perro"), "cat": ("Katze", "chat", "gato"),
    "sun": ("Sonne", "soleil", "sol"), "moon": ("Mond", "lune", "luna"), "friend": ("Freund", "ami", "amigo"),
    "love": ("Liebe", "amour", "amor"), "world": ("Welt", "monde", "mundo"), "night": ("Nacht", "nuit", "noche"),
    "day": ("Tag", "jour", "día"), "book": ("Buch", "livre", "libro"), "red": ("rot", "rouge", "rojo"),
    "green": ("grün", "vert", "verde"), "one": ("eins", "un", "uno"), "two": ("zwei", "deux", "dos"),
    "milk": ("Milch", "lait", "leche"), "city": ("Stadt", "ville", "ciudad"), "machine": ("Maschine", "machine", "máquina"),
}  # fmt: skip
LANGUAGES = ("German", "French", "Spanish")

LISTS = {
    "colours": ("red", "green", "blue", "yellow", "white", "black", "orange", "purple"),
    "colors": ("red", "green", "blue", "yellow", "white", "black", "orange", "purple"),
    "animals": ("dog", "cat", "horse", "bird", "fish", "cow", "fox", "bear"),
    "fruits": ("apple", "banana", "orange", "pear", "grape", "cherry", "lemon", "plum"),
    "vegetables": ("carrot", "potato", "onion", "tomato", "bean", "cabbage", "pea"),
    "countries": ("France", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway"),
    "cities": ("Paris", "London", "Tokyo", "Rome", "Berlin", "Cairo", "Oslo"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn"),
    "engines": ("MLX", "vLLM", "Ollama"), "engines of modelyard": ("MLX", "vLLM", "Ollama"),
    "programming languages": ("Python", "Go", "Rust", "Java", "C", "Ruby", "Swift"),
    "lease states": ("LIVE", "SUSPECT", "LOST", "DRAINING"), "priorities": ("low", "normal", "high", "critical"),
    "modelyard commands": ("up", "demo", "generate", "chat", "models", "servers", "explain"),
    "seasons": ("spring", "summer", "autumn", "winter"),
    "days of the week": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "musical instruments": ("piano", "guitar", "violin", "drum", "flute"),
    "drinks": ("water", "tea", "coffee", "milk", "juice"), "sports": ("football", "tennis", "swimming", "running"),
    "girl names": ("Anna", "Clara", "Emma", "Mia"), "boy names": ("Ben", "David", "Felix", "Leo"),
}  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven")

UNITS = (("miles", "kilometres"), ("kilometres", "miles"), ("pounds", "kilograms"), ("dollars", "euros"),
         ("hours", "minutes"), ("inches", "centimetres"), ("grams", "ounces"), ("feet", "metres"))  # fmt: skip
QUERIES = ("late binding", "the best pizza", "gRPC streaming", "cheap flights", "vLLM metrics", "garden tools",
           "MLX on a Mac", "red shoes", "new books", "old maps", "Python tutorials", "circuit breakers", "good music",
           "open source models", "small cars", "blue birds", "Kubernetes sidecars", "tea shops")  # fmt: skip

# Subjects that yardling knows nothing about: it says so.
UNKNOWN = tuple(
    """politics|history|football|chess|the stock market|biology|chemistry|philosophy|law|medicine|economics|geology|
astronomy|volcanoes|dinosaurs|tigers|elephants|whales|spiders|snakes|butterflies|roses|gardening|cooking|painting|
dancing|opera|jazz|the piano|the guitar|movies|films|actors|photography|fashion|shoes|hats|trains|airplanes|ships|
rockets|space travel|black holes|Mars|Jupiter|the stars|galaxies|gravity|electricity|magnets|batteries|solar power|
wind power|oil|gold|silver|diamonds|money|banks|taxes|insurance|houses|bridges|castles|pyramids|Rome|ancient Greece|
the Middle Ages|kings|queens|presidents|elections|the French Revolution|Napoleon|Albert Einstein|Shakespeare|Mozart|
Leonardo da Vinci|Isaac Newton|Marie Curie|Charles Darwin|the Olympic Games|basketball|tennis|skiing|swimming|yoga|
marathons|bicycles|motorcycles|horses|cows|chickens|farming|wheat|rice|cheese|chocolate|wine|beer|spaghetti|sushi|soup|
apples|bananas|vitamins|sleep|dreams|headaches|the heart|the brain|blood|bones|teeth|viruses|bacteria|vaccines|
doctors|hospitals|the Amazon|the desert|islands|earthquakes|hurricanes|climate change|recycling|plastic|paper|glass|
steel|bitcoin|video games|board games|puzzles|magic|ghosts|dragons|fairy tales|poetry|novels|newspapers|television|
radio|telephones|cameras|printers|keyboards|compilers|operating systems|JavaScript|Rust|Haskell|C++|Java|HTML|CSS|SQL|
encryption|blockchains|quantum computers|transistors|lasers|microscopes|telescopes|clocks|calendars|maps|languages|
grammar|Latin|Chinese|Arabic|alphabets|mathematical proofs|prime numbers|geometry|calculus|statistics|probability|
infinity|religion|ethics|psychology|marriage|children|parents|birthdays|holidays|Christmas|travel|hotels|New York|
Africa|Antarctica|the Moon landing|the Titanic|the Great Wall|the Eiffel Tower|the economy|inflation|jobs|teamwork|
marketing|sales|startups|leadership|cryptography|transformers|attention|PyTorch|TensorFlow|CUDA|Windows|Android|
the iPhone|Amazon|Google|Microsoft|Apple|Tesla|GPT-4|Claude|Gemini|Llama|Mistral|Qwen|DeepSeek""".replace("\n", "").split("|")
)  # fmt: skip

_SYLLABLES = tuple("ba be bi bo da de do fa fi ga go ha ka ki ko la le li lo ma me mi mo na ne ni no pa pe po ra re ri ro "
                   "sa se si so ta te ti to va ve vi wa we za zo ton ler ster mun gar bel dor fin lan rik".split())  # fmt: skip


def made_up_word(rng: random.Random) -> str:
    """Return a word that no dictionary has, so that the model learns to copy and not only to recall."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))
