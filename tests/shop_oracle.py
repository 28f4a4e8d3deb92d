"""The shop in plain Python: words in, words out."""

from treerl.environments.shop import COLORS, MATERIALS, PER_PAGE, PRICES, SIZES, STYLES, TOKENIZER, TYPES

KEYS = TYPES + MATERIALS + STYLES


class Shop:
    """One episode of a task. `goods` is the catalogue of `shop.catalogue` that the task is of."""

    def __init__(self, task, horizon, goods):
        word = lambda i: TOKENIZER.decode([int(i)])
        self.items = [
            dict(
                words=[word(w) for w in goods["words"][i]], price=PRICES[int(goods["price"][i])],
                colors=[c for c, has in zip(COLORS, goods["colors"][i]) if has],
                sizes=[s for s, has in zip(SIZES, goods["sizes"][i]) if has],
            )
            for i in range(len(goods["price"]))
        ]  # fmt: skip
        self.wanted = [word(w) for w in task["wanted"]]
        self.options = COLORS[int(task["color"])], SIZES[int(task["size"])]
        self.limit = PRICES[int(task["price"])]
        self.view, self.query, self.found, self.page, self.item = "start", [], [], 0, 0
        self.color = self.size = None
        self.turn, self.horizon, self.over, self.invalid = 0, horizon, False, False

    def ask(self):
        return " ".join(["find", *self.wanted, *self.options, "under", self.limit, ">"])

    def listing(self):
        shown = self.found[self.page * PER_PAGE :][:PER_PAGE]
        lines = [f"{label} {' '.join(self.items[i]['words'][:2])} {self.items[i]['price']}" for label, i in zip("abc", shown)]
        return " ".join(["page :", *lines, ">"])

    def step(self, text):
        if self.over:
            return "", 0.0, True
        self.turn += 1
        found = self.act(text)
        self.invalid = found is None
        reply, reward, bought = ("nothing >", 0.0, False) if found is None else found
        self.over = bought or self.turn == self.horizon
        return reply, reward, self.over

    def act(self, text):
        words = text.split()
        if not words or "." not in words or words.index(".") != len(words) - 1:
            return None
        verb, rest = words[0], words[1:-1]
        item = self.items[self.item]
        if verb == "search" and len(rest) in (1, 2) and len(set(rest)) == len(rest) and all(w in KEYS for w in rest):
            score = lambda i: sum(w in self.items[i]["words"] for w in rest)
            self.found = sorted(range(len(self.items)), key=lambda i: (-score(i), i))[:9]
            self.view, self.page, self.query, self.color, self.size = "results", 0, rest, None, None
            return self.listing(), 0.0, False
        if words == ["next", "."] and self.view == "results" and self.page < 2:
            self.page += 1
            return self.listing(), 0.0, False
        if verb == "open" and len(rest) == 1 and rest[0] in ("a", "b", "c") and self.view == "results":
            self.item, self.view = self.found[self.page * PER_PAGE + "abc".index(rest[0])], "item"
            self.color = self.size = None
            item = self.items[self.item]
            return " ".join(["item", *item["words"], item["price"], ":", *item["colors"], *item["sizes"], ">"]), 0.0, False
        if verb == "choose" and len(rest) == 1 and self.view == "item" and rest[0] in item["colors"] + item["sizes"]:
            if rest[0] in item["colors"]:
                self.color = rest[0]
            else:
                self.size = rest[0]
            return f"chosen {rest[0]} >", 0.0, False
        if words == ["back", "."] and self.view != "start":
            self.view = "results" if self.view == "item" else "start"
            self.color = self.size = None
            return (self.listing() if self.view == "results" else "start >"), 0.0, False
        if words == ["buy", "."] and self.view == "item":
            points = sum(a == b for a, b in zip(item["words"][1:], self.wanted[1:]))
            points += sum(a == b for a, b in zip((self.color, self.size), self.options)) + (int(item["price"]) <= int(self.limit))
            return "bought >", (1.0 if item["words"][0] == self.wanted[0] else 0.1) * points / 5, True
        return None

    def state(self):
        place = lambda names, x: -1 if x is None else names.index(x)
        found = dict(results=self.found, query=[KEYS.index(w) for w in self.query] + [26] * (2 - len(self.query))) if self.found else {}
        return dict(
            view=["start", "results", "item"].index(self.view), page=self.page, item=self.item, color=place(COLORS, self.color),
            size=place(SIZES, self.size), turn=self.turn, over=self.over, invalid=self.invalid, **found,
        )  # fmt: skip
