"""The household in plain Python: words in, words out."""

from treerl.environments.household import CONDITIONS, PLACES, ROOMS, THINGS

CLOSABLE = ("fridge", "cabinet", "drawer", "chest", "box")
TOOLS = {"clean": ("sink", "clean"), "heat": ("stove", "hot"), "cool": ("fridge", "cold")}


class Household:
    """One episode of a task (of numpy arrays, as `household.draw` makes them)."""

    def __init__(self, task, horizon):
        self.home = {place: ROOMS[int(room)] for place, room in zip(PLACES, task["rooms"])}
        self.where = {THINGS[int(t)]: PLACES[int(p)] for t, p in zip(task["things"], task["at"])}
        self.condition = {thing: "plain" for thing in self.where}
        self.target = list(self.where)[int(task["target"])]
        self.goal = PLACES[int(task["place"])], CONDITIONS[int(task["condition"])]
        self.room, self.place, self.open = ROOMS[int(task["room"])], None, {p for p in PLACES if p not in CLOSABLE}
        self.turn, self.horizon, self.over, self.invalid = 0, horizon, False, False

    def ask(self):
        place, condition = self.goal
        return " ".join(["put", *[condition] * (condition != "plain"), self.target, "in", place, ">"])

    def look_around(self):
        return " ".join([self.room, ":", *[p for p in PLACES if self.home[p] == self.room], ">"])

    def look_at(self, place):
        things = [t for t, p in self.where.items() if p == place] or ["empty"]
        return " ".join([place, *(things if place in self.open else ["closed"]), ">"])

    def step(self, text):
        """(observation, reward, done) of an action."""
        if self.over:
            return "", 0.0, True
        self.turn += 1
        reply, solved = self.act(text)
        self.invalid = reply is None
        self.over = solved or self.turn == self.horizon
        return ("nothing >" if reply is None else reply), float(solved), self.over

    def act(self, text):
        words = text.split()
        if len(words) != 3 or words[2] != ".":
            return None, False
        verb, noun = words[:2]
        hand = next((t for t, p in self.where.items() if p == "hand"), None)
        usable = self.place in self.open
        if verb == "go" and noun in ROOMS:
            self.room, self.place = noun, None
            return self.look_around(), False
        if verb == "go" and self.home.get(noun) == self.room:
            self.place = noun
            return self.look_at(noun), False
        if verb in ("open", "close") and noun == self.place and noun in CLOSABLE and (noun in self.open) == (verb == "close"):
            (self.open.add if verb == "open" else self.open.remove)(noun)
            return self.look_at(noun), False
        if verb == "take" and usable and hand is None and self.where.get(noun) == self.place:
            self.where[noun] = "hand"
            return f"holding {noun} >", False
        if verb == "put" and usable and noun == hand and hand is not None:
            self.where[noun] = self.place
            wanted = self.goal[1] in ("plain", self.condition[self.target])
            return self.look_at(self.place), wanted and self.where[self.target] == self.goal[0]
        if verb in TOOLS and noun == hand and hand is not None and self.place == TOOLS[verb][0]:
            self.condition[noun] = TOOLS[verb][1]
            return f"{TOOLS[verb][1]} {noun} >", False
        return None, False

    def state(self):
        """What the environment's own state says, in its terms."""
        index = dict(zip(PLACES, range(12)), hand=12)
        return dict(
            at=[index[p] for p in self.where.values()], condition=[CONDITIONS.index(c) for c in self.condition.values()],
            room=ROOMS.index(self.room), place=12 if self.place is None else index[self.place],
            open=[p in self.open for p in PLACES], turn=self.turn, over=self.over, invalid=self.invalid,
        )  # fmt: skip
