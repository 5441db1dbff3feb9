"""Text of the first run, which needs no network: small stories, put together from sentences that were written for it.

No two stories are the same, while their sentences repeat in other company: so little text has so much in it that a
model of a million parameters learns within a minute to write such stories itself, and who it was that lost what.

A template has choices, `[one|another]`, which may lie inside each other, and roles, `{hero.name}`. The same count and
seed give the same stories.
"""

import random
import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

SEED = 0
"""Seed of the stories of the first run."""

CHOICE = re.compile(r"\[([^\[\]]*)\]")
"""An innermost choice of a template."""


@dataclass(frozen=True)
class Character:
    """An animal of a story, with the pronouns that stand for it."""

    name: str
    kind: str
    trait: str
    they: str
    them: str
    their: str


@dataclass(frozen=True)
class Plot:
    """The middle of a story, between its opening and its end."""

    cases: tuple[dict[str, str], ...]
    """Things and places that belong together; a story has one of these sets as roles of its own."""
    sentences: tuple[str, ...]


def write_stories(count: int, *, seed: int = SEED) -> list[str]:
    """Return stories that differ from each other."""
    rng = random.Random(seed)

    # A dict has each text once and keeps the order, which a set does not.
    stories: dict[str, None] = {}
    while len(stories) < count:
        stories[write_story(rng)] = None
    return list(stories)


def fingerprint() -> str:
    """Return a hash of all that stories are put together from."""
    material = (SEED, NAMES, KINDS, TRAITS, PRONOUNS, OPENINGS, DETAILS, PLOTS, ENDINGS)
    return blake2b(repr(material).encode(), digest_size=16).hexdigest()


def write_story(rng: random.Random) -> str:
    """Return one story, a single paragraph."""
    hero, friend, helper = _cast(rng)
    plot = rng.choice(PLOTS)

    # Chosen once for the whole story: a kite that is red in one sentence is red in the next.
    case = {role: _choose(rng, text) for role, text in rng.choice(plot.cases).items()}
    roles = {"hero": hero, "friend": friend, "helper": helper, **case}

    templates = (*rng.choice(OPENINGS), *rng.sample(DETAILS, 2), *plot.sentences, rng.choice(ENDINGS))
    sentences = [_sentence(rng, template, roles) for template in templates]
    return " ".join(sentences)


def _cast(rng: random.Random) -> list[Character]:
    """Return three characters whose names, kinds and traits differ."""
    names = rng.sample([(name, gender) for gender in NAMES for name in NAMES[gender]], 3)
    kinds = rng.sample(KINDS, 3)
    traits = rng.sample(TRAITS, 3)
    return [
        Character(name, kind, trait, *PRONOUNS[gender])
        for (name, gender), kind, trait in zip(names, kinds, traits, strict=True)
    ]


def _sentence(rng: random.Random, template: str, roles: dict[str, Any]) -> str:
    """Return the sentence that a template makes of the roles, with a capital letter."""
    text = _choose(rng, template).format(**roles)
    return text[0].upper() + text[1:]


def _choose(rng: random.Random, template: str) -> str:
    """Return a template in which every choice is made, the innermost ones first."""
    while CHOICE.search(template):
        template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return template


def _words(text: str) -> list[str]:
    return text.split()


def _any_of(text: str) -> str:
    """Return a choice between words."""
    return f"[{'|'.join(_words(text))}]"


# ---------------------------------------------------------------- who and where

PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}

NAMES = {
    "she": _words("""
        Ada Anna Bella Carla Clara Daisy Dora Edith Ella Emma Fanny Flora Frieda Greta Hanna Helen Ida Iris Jenny Julia
        Kate Laura Lily Lotte Maria Mia Molly Nelly Nora Olga Paula Rita Rosa Ruth Sarah Tilda Vera Wilma
    """),
    "he": _words("""
        Adam Albert Anton Ben Bruno Carl Casper David Dennis Emil Ernest Felix Frank George Gustav Henry Hugo Jacob
        Jonas Karl Leo Louis Max Martin Nick Oscar Otto Paul Peter Ralph Robert Samuel Simon Theo Tom Victor Walter
    """),
}

KINDS = _words("""
    badger bear beaver boar cat crow deer dog donkey dormouse duck ferret fox frog goat goose hamster hare hedgehog hen
    lamb lizard lynx marten mole mouse pig pigeon pony rabbit raven robin seal sheep snail squirrel toad turtle wolf
""")

TRAITS = _words("""
    brave bright busy calm careful cheerful clever curious dreamy faithful friendly funny gentle hungry kind lazy little
    lively lonely merry noisy patient plump polite proud quick quiet shy sleepy small strong stubborn tidy tiny young
""")

COLOUR = _any_of("red blue green yellow white black brown purple golden silver grey pink")
FRUIT = _any_of("apples pears plums cherries nuts berries grapes carrots beans mushrooms turnips onions peas figs")
FOOD = "[porridge|bread and butter|warm milk|pancakes|potato soup|cheese|noodles|baked apples|honey cake|dumplings]"
FLOWER = _any_of("roses daisies tulips poppies violets lilies sunflowers bluebells")
TREE = _any_of("oak birch apple willow pine chestnut maple linden cherry pear")
BIRD = _any_of("sparrow swallow lark cuckoo stork heron blackbird jay woodpecker nightingale magpie finch")
CLOTHES = _any_of("scarf coat cap shirt jacket tunic belt cloak waistcoat ribbon")
BAG = _any_of("basket bag sack bucket box jar barrow pouch")
PLACE = (
    "[near the river|at the edge of the forest|behind the old mill|on top of a green hill|by the lake|next to the "
    "church|at the end of the village|below the castle|in a narrow valley|among tall ferns|not far from the sea|"
    "between two fields|under the stone bridge|beside the railway]"
)
DWELLING = (
    "[a hollow tree|a small house|a warm burrow|a red cottage|an old barn|a round hut|a wooden tower|a dry cave|"
    "an empty boat|a tent of leaves|a garden shed|a crooked windmill]"
)
FAMILY = _any_of("mother father grandmother grandfather aunt uncle sister brother cousin godmother")
WORK = (
    "[the baker was kneading dough|the miller was carrying flour|the fisherman was mending his net|"
    "the tailor was threading a needle|the smith was hammering iron|the gardener was watering the beds|"
    "the farmer was cutting hay|the shepherd was counting sheep|the carpenter was sawing a board|"
    "the postman was ringing a bell|the potter was turning a jug|the painter was mixing colours|"
    "the teacher was reading aloud|the cook was tasting the sauce|the beekeeper was gathering honey|"
    "the cobbler was sewing a boot|the weaver was winding yarn|the sailor was tying a knot]"
)
DOING = (
    f"[looking for {FRUIT}|carrying a {BAG} of {FRUIT}|singing a song about {FLOWER}|picking {FLOWER}|"
    f"mending a {COLOUR} {CLOTHES}|washing a {CLOTHES}|selling {FRUIT}|drawing a {BIRD}|feeding a {BIRD}|"
    "sweeping the road|pushing a cart|resting in the shade|waiting for the post]"
)

HOME = f"in {DWELLING} {PLACE}"

DETAILS = (
    f"{{hero.name}} wore a {COLOUR} {CLOTHES} and carried a {BAG} full of {FRUIT}.",
    f"on the [way|road|path], they met a {_any_of(' '.join(TRAITS))} {_any_of(' '.join(KINDS))} who was {DOING}.",
    f"the {TREE} trees were [in bloom|bare|full of birds|turning yellow|wet with dew], and {WORK}.",
    f"{{hero.name}} had eaten {FOOD} [for breakfast|for lunch] and {{friend.name}} {FOOD}.",
    f"a {BIRD} sat on the [fence|roof|gate|wall|chimney|well] and [sang|watched them|cleaned its feathers|slept].",
    f"it smelled of {FLOWER} and [fresh|warm|wet|sweet] [hay|bread|earth|rain|wood|grass].",
    f'"Look, a {BIRD}!" [whispered|called|cried|said] {{friend.name}}, and {{friend.they}} pointed at the {TREE} tree.',
    f"in the [village|square|street|next house], {WORK}.",
    f"{{friend.name}} was {DOING} [that day|as usual|when it began|at that time].",
    f"{{hero.their}} {FAMILY} had given {{hero.them}} a {COLOUR} {CLOTHES} for [the winter|{{hero.their}} birthday|the "
    "journey].",
    "the [sky|water|air|light] was [grey|golden|bright|clear|cold|blue|pale], and somewhere a [dog barked|bell rang|"
    f"child laughed|wagon rattled|{BIRD} called|flute played].",
)
"""Sentences that fit into every story, of which each has some."""

OPENINGS = (
    (
        "[Once upon a time|Long ago|Once|Many years ago], there was a {hero.trait} {hero.kind} named {hero.name}.",
        f"{{hero.they}} lived {HOME} with {{hero.their}} {FAMILY}.",
        "{hero.their} best friend was a {friend.trait} {friend.kind} named {friend.name}.",
    ),
    (
        f"{{hero.name}} was a {{hero.trait}} {{hero.kind}} who lived {HOME}.",
        "next door lived {friend.name}, a {friend.trait} {friend.kind}, and the two [played together every day|"
        "were the best of friends|did everything together|shared all their secrets].",
    ),
    (
        "a {hero.trait} {hero.kind} named {hero.name} and a {friend.trait} {friend.kind} named {friend.name} lived "
        f"{HOME}.",
        "[everyone in the valley knew them|they shared everything they had|they were never apart for long|they had "
        "known each other since they were small].",
    ),
)

ENDINGS = (
    "[That evening|That night], {hero.name} [fell asleep with a smile|slept very well|dreamed of the next day].",
    "and from that day on, {hero.name} and {friend.name} were [even better friends|happier than ever before].",
    "{hero.name} never forgot that day, and neither did {friend.name}.",
    "then the two friends went home and had [warm soup|hot tea and cake|bread with honey] for supper.",
    '"What a [wonderful|strange|lovely] day!" said {hero.name}, and {friend.name} [nodded|laughed|thought so too].',
)

MORNING = (
    "[one|on a] [sunny|cold|windy|bright|warm|rainy|foggy|cloudy|clear|hot|mild|stormy] "
    "[morning|afternoon|evening|Monday|Friday|Sunday|day in spring|day in summer|day in autumn]"
)

# ---------------------------------------------------------------- what happens

LOST = Plot(
    cases=(
        {"thing": "[red|blue|green|yellow] ball", "spot": "under a bush", "use": "play with it"},
        {"thing": "[red|blue|woollen|warm] hat", "spot": "on a branch", "use": "wear it"},
        {"thing": "[silver|golden|little|old] key", "spot": "between two stones", "use": "open the door"},
        {"thing": "[wooden|silver|little] flute", "spot": "in the tall grass", "use": "play a song"},
        {"thing": "[picture|story|song] book", "spot": "on the bench", "use": "read it"},
        {"thing": "[shiny|brass|little] bell", "spot": "in a bird's nest", "use": "ring it"},
    ),
    sentences=(
        f"{MORNING}, {{hero.name}} could not find {{hero.their}} {{thing}}.",
        "{hero.they} looked [under the bed|behind the door|in every corner] and [in the garden|in the kitchen|"
        "on the stairs], but it was not there.",
        '"[Have you seen|Do you know where to find] my {thing}?" {hero.they} asked {friend.name}.',
        '"No," said {friend.name}, "but I will help you [look for it|find it]."',
        "they [walked along the path|went back to the meadow|asked everyone they met] until {friend.name} saw "
        "something {spot}.",
        "it was the {thing}!",
        "{hero.name} was so [glad|happy] that {hero.they} let {friend.name} {use} [first|all afternoon].",
    ),
)

STUCK = Plot(
    cases=(
        {"thing": "[red|blue|yellow|paper] kite", "spot": "in the top of a tall tree", "play": "flying"},
        {"thing": "[red|blue|green] ball", "spot": "on the roof of the barn", "play": "throwing"},
        {"thing": "[white|little|paper] boat", "spot": "on a rock in the river", "play": "sailing"},
        {"thing": "[yellow|straw|woollen] hat", "spot": "on the arm of the windmill", "play": "tossing"},
    ),
    sentences=(
        f"{MORNING}, {{hero.name}} and {{friend.name}} were {{play}} a {{thing}} [in the meadow|on the hill].",
        "[suddenly|all at once], the wind [took it away|carried it off], and it got stuck {spot}.",
        "{hero.name} [jumped as high as {hero.they} could|stretched as far as {hero.they} could|threw a stick at it], "
        "but [it was no use|it did not move].",
        '"We need somebody who is [taller|stronger|bigger] than we are," said {friend.name}.',
        "[so they|they] called {helper.name} the {helper.kind}, who [came at once|brought a ladder|brought a long "
        "rope].",
        "{helper.name} [reached up|took a deep breath|climbed slowly] and got the {thing} back.",
        '"Thank you!" [cried|called|shouted] {hero.name}, and they let {helper.name} play with them.',
    ),
)

SHARED = Plot(
    cases=(
        {"food": "[apple|cherry|plum] pie", "part": "slice"},
        {"food": "[honey|chocolate|carrot] cake", "part": "slice"},
        {"food": "[fresh|warm|round] bread", "part": "piece"},
        {"food": "[yellow|soft|good] cheese", "part": "piece"},
        {"food": "[mushroom|pumpkin|carrot] soup", "part": "bowl"},
    ),
    sentences=(
        f"{MORNING}, {{hero.name}} made some {{food}} and [could not wait to eat it|put it on the table].",
        "[just then|a moment later], {friend.name} knocked at the door.",
        '"That smells [so good|wonderful]," said {friend.name}. "May I have a {part} of your {food}?"',
        "{hero.name} [did not want to share|wanted to keep it all], so {hero.they} said no, and {friend.name} went "
        "away [sadly|without a word].",
        "but the {food} did not taste good, because {hero.name} [was all alone|thought of {friend.name}].",
        '{hero.they} ran after {friend.name} and said, "I am sorry. Please come and eat with me."',
        "they each had a big {part}, and now the {food} tasted [better than ever|wonderful].",
    ),
)

AFRAID = Plot(
    cases=(
        {"fear": "the dark", "moment": "when the sun went down", "gift": "a small lantern"},
        {"fear": "thunder", "moment": "when black clouds came", "gift": "a soft blanket"},
        {"fear": "deep water", "moment": "when they came to the lake", "gift": "a piece of cork"},
        {"fear": "the old bridge", "moment": "when they had to cross the river", "gift": "a strong rope"},
        {"fear": "the forest", "moment": "when they had to gather wood", "gift": "a little whistle"},
    ),
    sentences=(
        "{hero.name} was afraid of {fear}, but {hero.they} [told nobody|was ashamed of it].",
        "{moment}, {hero.name} [began to shake|hid behind a stone|closed {hero.their} eyes].",
        '"[What is wrong|Why are you so quiet]?" asked {friend.name}.',
        '"I am afraid of {fear}," said {hero.name} [softly|at last].',
        "{friend.name} did not laugh, but gave {hero.them} {gift} and [held {hero.their} hand|stayed near].",
        '"When I was small, I was afraid of {fear} too," {friend.they} said.',
        "step by step, {hero.name} grew braver, and soon {hero.they} was not afraid of {fear} any more.",
    ),
)

GARDEN = Plot(
    cases=(
        {"plant": "sunflower", "first": "a green leaf", "last": "a flower as big as a plate"},
        {"plant": "pear tree", "first": "a thin twig", "last": "ten golden pears"},
        {"plant": "pumpkin", "first": "a yellow flower", "last": "a pumpkin as big as a wheel"},
        {"plant": "rose", "first": "a tiny bud", "last": "the reddest rose of all"},
        {"plant": "cherry tree", "first": "a white flower", "last": "a basket full of cherries"},
    ),
    sentences=(
        "in spring, {hero.name} [found|bought|was given] the seed of a {plant}.",
        "{hero.they} planted it [behind the house|beside the well|in the garden].",
        "{hero.they} gave it water every [morning|evening], but nothing happened for [a week|a long time|many days].",
        '"It will never grow," said {hero.name}.',
        '"You must [be patient|wait a little longer]," said {friend.name}.',
        "[then it rained|then the sun came out], and the next day they saw {first}.",
        "[weeks passed|the summer passed], and the {plant} grew [taller and taller|bigger every day].",
        "in the end there was {last}, and {hero.name} showed it to everybody.",
    ),
)
RACE = Plot(
    cases=(
        {"goal": "the old mill", "pause": "lay down under a tree and fell asleep"},
        {"goal": "the stone bridge", "pause": "stopped to eat berries"},
        {"goal": "the big oak", "pause": "sat down to look at the clouds"},
        {"goal": "the end of the lake", "pause": "stopped to talk with an old heron"},
    ),
    sentences=(
        '"I am the fastest runner in the whole [valley|forest|village]," said {hero.name}.',
        '"Then let us race to {goal}," said {friend.name}.',
        "{hero.name} [ran like the wind|was far ahead very soon], and {friend.name} followed [slowly|step by step].",
        "halfway to {goal}, {hero.name} thought that {hero.they} had [plenty of time|already won].",
        "so {hero.they} {pause}.",
        "{friend.name} did not stop and came to {goal} first.",
        '"[You were fast|You ran well]," said {friend.name}, "but I [did not rest|never gave up]."',
    ),
)

HURT = Plot(
    cases=(
        {"bird": "sparrow", "hurt": "a broken wing", "feed": "seeds"},
        {"bird": "swallow", "hurt": "a thorn in its foot", "feed": "flies"},
        {"bird": "young owl", "hurt": "a broken wing", "feed": "small pieces of meat"},
        {"bird": "robin", "hurt": "a cut on its leg", "feed": "worms"},
    ),
    sentences=(
        f"{MORNING}, {{hero.name}} found a {{bird}} [in the snow|beside the road|under the window].",
        "it had {hurt} and could not fly [home|away].",
        "{hero.name} carried the {bird} home, and {friend.name} made a bed for it [out of straw|in a basket].",
        "they gave it {feed} and water [three times a day|every few hours] until it was well again.",
        "then they opened the window, and the {bird} flew [into the sky|over the trees].",
        '{hero.name} was [a little sad|sad and happy at once], but {friend.name} said, "It will come back."',
        "in the next spring, the {bird} sat at the window and sang [for them|the whole morning].",
    ),
)

TRUTH = Plot(
    cases=(
        {"thing": "[blue|white|painted] cup", "place": "on the kitchen floor", "remedy": "glued the pieces together"},
        {"thing": "[kitchen|round|big] window", "place": "behind the house", "remedy": "put in new glass"},
        {"thing": "[garden|little|wooden] gate", "place": "in front of the house", "remedy": "hung it up again"},
        {"thing": "[glass|green|tall] bottle", "place": "in the cellar", "remedy": "swept up the glass"},
    ),
    sentences=(
        "one day, while {hero.they} was playing {place}, {hero.name} broke the {thing} of {friend.name}.",
        "[nobody had seen it|nobody was near], so {hero.they} [ran away|hid behind a tree|said nothing].",
        '"Who broke my {thing}?" asked {friend.name} [sadly|angrily].',
        '"It was {helper.name} the {helper.kind}," said {hero.name}, but {hero.they} [felt bad|could not sleep].',
        "the next morning, {hero.they} went to {friend.name} and told the truth.",
        '"I broke your {thing}, and I am sorry," {hero.they} said.',
        "{friend.name} was [not angry any more|glad to hear the truth], and together they {remedy}.",
    ),
)

SKILL = Plot(
    cases=(
        {"skill": "swim", "place": "at the lake", "fail": "sank like a stone", "hint": "Kick with your legs"},
        {
            "skill": "skate",
            "place": "on the frozen pond",
            "fail": "fell on the ice",
            "hint": "Bend your knees",
        },
        {"skill": "whistle", "place": "on the hill", "fail": "only blew air", "hint": "Make your lips round"},
        {"skill": "bake bread", "place": "in the kitchen", "fail": "burned it", "hint": "Watch the fire"},
        {"skill": "paint", "place": "in the garden", "fail": "spilled the colours", "hint": "Use a thin brush"},
        {"skill": "climb", "place": "at the big oak", "fail": "slid down again", "hint": "Look for a strong branch"},
    ),
    sentences=(
        "{hero.name} wanted to learn how to {skill}, because {helper.name} the {helper.kind} could do it so well.",
        f"{MORNING}, {{hero.they}} tried it {{place}}, but {{hero.they}} {{fail}}.",
        '{helper.name} [laughed|smiled] and said, "You will never learn how to {skill}."',
        '"Do not listen," said {friend.name}. "{hint}, and try again."',
        "so {hero.name} went back [every day|every morning] and [practised|tried again and again].",
        "at first {hero.they} {fail}, but [after a week|little by little] it went better.",
        "at last {hero.name} could {skill} as well as {helper.name}, and everyone [clapped|cheered].",
    ),
)

LOST_WAY = Plot(
    cases=(
        {"reason": "to pick berries", "sign": "the sound of the river", "path": "followed the water"},
        {"reason": "to gather mushrooms", "sign": "the light of a window", "path": "walked towards the light"},
        {"reason": "to look for nuts", "sign": "the bell of the village", "path": "followed the sound"},
        {"reason": "to catch butterflies", "sign": "the brightest star", "path": "walked below the star"},
    ),
    sentences=(
        f"{MORNING}, {{hero.name}} and {{friend.name}} went into the forest {{reason}}.",
        "they went [deeper and deeper|from tree to tree] and did not see how late it was.",
        "[when it grew dark|when the fog came], every path looked the same.",
        '"We are lost," said {friend.name}, and {friend.they} began to cry.',
        '"[Do not worry|Be quiet for a moment]," said {hero.name}, and then {hero.they} noticed {sign}.',
        "they {path} [for an hour|through the bushes] until they came out of the forest.",
        "{helper.name} the {helper.kind} was waiting [at the gate|on the road], [very glad|so happy] to see them.",
    ),
)

RAIN = Plot(
    cases=(
        {"shelter": "a big mushroom", "danger": "the rain", "thanks": "a basket of nuts"},
        {"shelter": "an old boat", "danger": "the hail", "thanks": "a jar of honey"},
        {"shelter": "a hollow tree", "danger": "the storm", "thanks": "a pair of socks"},
        {"shelter": "a small cave", "danger": "the snow", "thanks": "a bag of apples"},
    ),
    sentences=(
        "one [day|evening], {hero.name} was [far from home|on the way home] when {danger} began.",
        "{hero.they} found {shelter} and waited there.",
        '[soon|after a while] {friend.name} came and asked, "Is there room for me too?"',
        '"It is very small," said {hero.name}, "but come in."',
        "then {helper.name} the {helper.kind} came, [cold and wet|shaking with cold], and they moved [closer together|"
        "a little] to let {helper.them} in.",
        "they told each other stories until {danger} was over.",
        "the next day {helper.name} brought {hero.them} {thanks} to say thank you.",
    ),
)
PRESENT = Plot(
    cases=(
        {"gift": "a cake", "missing": "sugar", "source": "the baker"},
        {"gift": "a scarf", "missing": "wool", "source": "the old sheep on the hill"},
        {"gift": "a wooden boat", "missing": "nails", "source": "the blacksmith"},
        {"gift": "a picture", "missing": "blue paint", "source": "the painter by the sea"},
        {"gift": "a crown of flowers", "missing": "roses", "source": "the gardener"},
    ),
    sentences=(
        "it was the [last day|evening] before the birthday of {friend.name}, and {hero.name} wanted to make {gift}.",
        "but there was no {missing} [in the house|anywhere].",
        "{hero.name} asked {helper.name} the {helper.kind}, who had no {missing} either.",
        '"Go to {source}," said {helper.name}. "There is always {missing} there."',
        "so {hero.name} [walked all the way|ran as fast as {hero.they} could] and came back with {missing}.",
        "{hero.they} worked on {gift} [all night|until midnight].",
        '[in the morning|the next day], {friend.name} opened the box and said, "This is the best present of all!"',
    ),
)

QUARREL = Plot(
    cases=(
        {"thing": "swing", "wish": "swing", "turn": "push"},
        {"thing": "sledge", "wish": "ride", "turn": "pull"},
        {"thing": "drum", "wish": "drum", "turn": "sing"},
        {"thing": "little boat", "wish": "row", "turn": "steer"},
    ),
    sentences=(
        f"{MORNING}, {{helper.name}} the {{helper.kind}} gave the two friends a {{thing}}.",
        '"I want to {wish} first," said {hero.name}.',
        '"No, I want to {wish} first," said {friend.name}, and they began to [shout|quarrel].',
        "they [pulled at it from both sides|turned their backs on each other], and nobody [had any fun|was happy].",
        "then {hero.name} had an idea.",
        '"You {wish} and I {turn}," {hero.they} said, "and after that we [change places|take turns]."',
        "so they did, and the {thing} was [twice as much fun|never still] until [evening|it was dark].",
    ),
)

TREASURE = Plot(
    cases=(
        {"map": "in an old bottle", "spot": "three steps from the big rock", "treasure": "a box of shells"},
        {"map": "inside a book", "spot": "below the apple tree", "treasure": "a silver spoon"},
        {"map": "behind a picture", "spot": "beside the dry well", "treasure": "a bag of glass marbles"},
        {"map": "in the pocket of a coat", "spot": "under the third step", "treasure": "a golden button"},
    ),
    sentences=(
        f"{MORNING}, {{hero.name}} found a map {{map}}.",
        '"There is a treasure {spot}," said {hero.name} [with shining eyes|in a whisper].',
        "{friend.name} brought [a spade|two spades|a lamp], and they set off [at once|after breakfast].",
        "they dug {spot} until [their backs hurt|noon], and then they hit something hard.",
        "it was only {treasure}, [not gold|no gold at all].",
        '"I do not mind," said {friend.name}. "[Looking for it|Digging] was the best part."',
        "they put {treasure} on the shelf, where everyone could see it.",
    ),
)

SNOW = Plot(
    cases=(
        {"figure": "snowman", "nose": "a carrot", "hat": "an old pot"},
        {"figure": "snow bear", "nose": "a potato", "hat": "a red cap"},
        {"figure": "snow queen", "nose": "a small cone", "hat": "a crown of leaves"},
    ),
    sentences=(
        "in winter, {hero.name} and {friend.name} built a {figure} [in front of the house|on the hill].",
        "it had {nose} for a nose and wore {hat} on its head.",
        "every morning {hero.name} said good morning to the {figure}.",
        "but one day the sun was [warm|strong], and the {figure} grew [smaller and smaller|thin].",
        "by evening only {nose} and {hat} were left [on the grass|in a puddle], and {hero.name} [cried|was very sad].",
        '"Do not cry," said {friend.name}. "The {figure} will come back next winter."',
        "so they kept {hat} in a [box|cupboard] and waited for the snow.",
    ),
)

PLOTS = (
    LOST,
    STUCK,
    SHARED,
    AFRAID,
    GARDEN,
    RACE,
    HURT,
    TRUTH,
    SKILL,
    LOST_WAY,
    RAIN,
    PRESENT,
    QUARREL,
    TREASURE,
    SNOW,
)
