"""TextWorld: small text adventures that its own generator makes, with their own words. Needs `pip install textworld`.

The agent walks through the rooms of a house and opens, takes, puts, unlocks and eats things until a quest is done, for
reward 1. The goal is the game's own account of the quest, the observation what it answers, see `host` for how both
become tokens. An action is a command such as "take key from box"; one that the game does not list as admissible is
invalid. The game answers it all the same, unless it begins with no verb of the quests: those are for the machine, such
as "undo" and "restart", or answer a question of its own.

Games are made when they are first needed, about a second each, in the process that plays them, and kept in a folder.
Tasks of the split novel have more rooms and longer quests. TextWorld, arXiv 1806.11532.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from typing import Literal

from treerl.environments import SPLITS, Environment
from treerl.environments.host import TURN, WORD, adapt, numbered, words
from treerl.errors import UserError, writing
from treerl.tokenizers import WordTokenizer

APART = 2**24  # from the first number of a split to that of the next
# What the compiled games say in addition to the words of the generator's grammar.
SPOKEN = """
    a able already an and any anything are aren't as at be been but by can can't carried carrying closed command
    contains could did do don't door down drop dropped east eat eaten end exit first floor for from go going gone good
    got ground have here hold holding how i i'm in inedible inside into inventory is isn't it it's its itself just key
    like lock locked lost me more much must need no north nothing noun of off ok on one only open opened opening or
    other out over passes plainly player point points possible provide put putting quite really recognise revealing say
    score see seem seems something south specific supposed take taken that that's the them there there's things this to
    too top turn turns under understood unlock unlocked up verb want was way welded west what which with won't would
    you you'd you're your yourself
"""


def load(folder: str, seed: int, sizes: dict[str, tuple[int, int, int]], instructions: str, mistakes: float) -> "Adventure":
    """A game for `host`, see `make`."""
    return Adventure(folder, seed, sizes, instructions, mistakes)


class Adventure:
    """A TextWorld game, as `treerl.games` plays it.

    Args:
      sizes: split -> rooms, objects, quest length.
    """

    def __init__(self, folder: str, seed: int, sizes: dict[str, tuple[int, int, int]], instructions: str, mistakes: float):
        self._folder, self._seed, self._sizes, self._mistakes = folder, seed, sizes, mistakes
        self._last, self._env = instructions == "last", None

    def reset(self, number: int) -> str:
        import textworld

        wanted = ("feedback", "objective", "admissible_commands", "policy_commands", "verbs", "won")
        self._env = textworld.start(self._file(number), textworld.EnvInfos(**dict.fromkeys(wanted, True)))
        self._state = self._env.reset()
        return _spoken(self._state.feedback, self._state.objective)

    def step(self, text: str) -> tuple[str, float, bool, bool]:
        # A name may have marks or capitals that an agent cannot write.
        known = {" ".join(words(command)): command for command in self._state.admissible_commands}
        if text not in known and text.split()[0] not in self._state.verbs:
            return "That's not a verb I recognise.", 0.0, False, False
        self._state, _, done = self._env.step(known.get(text, text))
        return _spoken(self._state.feedback), float(self._state.won), bool(done), text in known

    def goal(self, number: int) -> str:
        import textworld

        return textworld.Game.load(self._file(number)[: -len("z8")] + "json").objective

    def key(self) -> str:
        return repr((sorted(map(str, self._state["_facts"])), self._state.won))

    def script(self, rng) -> str:
        """The next command of the game's own solution, or by mistake another that is admissible."""
        best = self._state.policy_commands[:1]
        others = [command for command in self._state.admissible_commands if command not in best]
        errs = rng.random() < self._mistakes
        return rng.choice(others) if others and (errs or not best) else best[0]

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _file(self, number: int) -> str:
        """The path of a game, which is made if it is not there; whole folders are moved, so that none is half there."""
        split, index = SPLITS[number // APART], number % APART
        folder = os.path.join(self._folder, f"{split}-{index}")
        if not os.path.exists(folder):
            made = tempfile.mkdtemp(prefix="making-", dir=self._folder)
            try:
                self._generate(os.path.join(made, "game.z8"), split, index)
                with contextlib.suppress(OSError):  # another process was first
                    os.rename(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        return os.path.join(folder, "game.z8")

    def _generate(self, path: str, split: str, index: int) -> None:
        import textworld

        options = textworld.GameOptions()
        options.nb_rooms, options.nb_objects, options.quest_length = self._sizes[split]
        digest = hashlib.blake2b(f"{self._seed} {split} {index}".encode(), digest_size=4).digest()
        options.seeds = int.from_bytes(digest, "little")
        options.grammar.only_last_action = self._last
        options.path = path
        textworld.make(options)
        os.remove(path[: -len("z8")] + "ni")  # its source


def _spoken(feedback: str, objective: str = "") -> str:
    """What a game says, without the banner and the quest at its start, the line of its state, and what follows its end."""
    said = feedback[feedback.rfind("$$") + 2 :] if "$$" in feedback else feedback
    said = said.partition(objective)[2] if objective and objective in said else said
    return re.sub(r"\n>[^\n]*$", "", said).partition("***")[0].strip()


def vocabulary() -> tuple[str, ...]:
    """The words of TextWorld's grammar of houses and of its compiled games, and the turn, in alphabetical order."""
    from textworld.generator.text_grammar import Grammar, GrammarOptions

    grammar = Grammar(GrammarOptions(theme="house")).get_vocabulary()
    found = {word for text in (*grammar, SPOKEN) for word in WORD.findall(text.lower())}
    return tuple(sorted(word for word in found if word[0].isalnum())) + (TURN,)


def make(
    *, seed: int = 0, train_size: int = 64, heldout_size: int = 16, horizon: int = 16, rooms: int = 2, objects: int = 4,
    quest: int = 3, novel_rooms: int = 3, novel_quest: int = 4, instructions: Literal["all", "last"] = "all",
    mistakes: float = 0.3, goal: int = 96, observation: int = 96, action: int = 12, seconds: float = 60.0,
    workers: int = 2, live: int = 256, folder: str = "",
) -> Environment:  # fmt: skip
    """The environment with its tasks.

    Args:
      rooms, objects, quest: of games of train and heldout; a quest is so many commands long.
      novel_rooms, novel_quest: of those of novel.
      instructions: whether a goal tells of all commands of the quest, or of the last alone.
      mistakes: chance of each of the scripted player's actions to be another than that of the game's own solution.
      goal, observation, action: tokens at most; more are cut.
      seconds, workers, live: see `host.adapt`; a game is made within the seconds, too.
      folder: keeps the games; "" is treerl/textworld in the user's cache.

    Raises:
      UserError: TextWorld is missing, the folder cannot be written, or a number cannot work.
    """
    if importlib.util.find_spec("textworld") is None:
        raise UserError("task.name=textworld needs a package that is missing; pip install textworld.")
    import textworld

    given = dict(rooms=rooms, objects=objects, quest=quest, novel_rooms=novel_rooms, novel_quest=novel_quest)
    for name, value in given.items():
        if value < 1:
            raise UserError(f"environment.options.{name}={value!r} cannot work; set it to 1 or more.")
    if not 0 <= mistakes <= 1:
        raise UserError(f"environment.options.mistakes={mistakes!r} cannot work; set it to a number from 0 to 1.")
    like, other = (rooms, objects, quest), (novel_rooms, objects, novel_quest)
    if like == other:
        raise UserError("environment.options: novel games are like the others; set another novel_rooms or novel_quest.")
    sizes = dict(zip(SPLITS, (like, like, other)))
    options = repr((textworld.__version__, seed, sizes, instructions))
    folder = os.path.expanduser(folder) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "treerl", "textworld"
    )
    folder = os.path.join(os.path.abspath(folder), hashlib.blake2b(options.encode(), digest_size=8).hexdigest())
    with writing(folder, "set environment.options.folder to one that can be."):
        os.makedirs(folder, exist_ok=True)
    tasks = numbered(dict(zip(SPLITS, (train_size, heldout_size, heldout_size))), APART)
    return adapt(
        load, (folder, seed, sizes, instructions, mistakes), tokenizer=WordTokenizer(vocabulary()), tasks=tasks, goal=goal,
        observation=observation, action=action, horizon=horizon, seconds=seconds, workers=workers, live=live, player=True,
    )  # fmt: skip
