"""A web shop, the WebShop shape of problem: "find shirt wool plain red small under 40".

256 products, no two of one type, material and style; each comes in three of six colors and two of four sizes. What the
agent can do:

    search WORD [WORD]   from anywhere, with types, materials and styles: products with the most of these words first, of
                         equals the one with the lowest number; nine results on three pages
    next                 on pages one and two: the page after
    open a | b | c       on a page: an item of it
    choose COLOR | SIZE  of those that the item comes in
    back                 from an item to its page, from a page to the start
    buy                  the item: the end

Anything else changes nothing and is answered by "nothing". The reward comes with the purchase (WebShop, arXiv 2207.01206,
section 3.2, with its texts' similarity replaced by equality of words):

    reward = (1 if the type is right else 0.1) * (attributes + options + price right) / 5,

attributes being material and style, options color and size, and the price right at or below the limit. An episode is
solved if the reward is 1. The catalogue is the same for all tasks but those of the split novel, which shop in another one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from treerl.environments import Environment, draw_tasks, ended, say, timed
from treerl.errors import UserError
from treerl.tokenizers import WordTokenizer

TYPES = ("shirt", "dress", "shoes", "lamp", "rug", "chair", "bag", "watch", "pillow", "curtain")
MATERIALS = ("wool", "cotton", "silk", "leather", "wood", "metal", "plastic", "glass")
STYLES = ("plain", "striped", "dotted", "classic", "modern", "soft", "light", "heavy")
COLORS = ("red", "blue", "green", "black", "white", "grey")
SIZES = ("small", "medium", "large", "huge")
PRICES = ("10", "20", "30", "40", "50", "60", "70", "80", "90")
LABELS = ("a", "b", "c")
VERBS = ("search", "next", "open", "choose", "back", "buy")
OTHERS = (":", ">", "find", "under", "start", "page", "item", "chosen", "bought", "nothing")
TOKENIZER = WordTokenizer(VERBS + TYPES + MATERIALS + STYLES + COLORS + SIZES + PRICES + LABELS + OTHERS)
SEARCH, NEXT, SHOW, CHOOSE, BACK, BUY = TOKENIZER.encode(" ".join(VERBS))
TYPE, MATERIAL, STYLE, COLOR, SIZE, PRICE, LABEL = (
    TOKENIZER.encode(names[0])[0] for names in (TYPES, MATERIALS, STYLES, COLORS, SIZES, PRICES, LABELS)
)  # fmt: skip
COLON, TURN, FIND, UNDER, BEGIN, PAGE, ITEM, CHOSEN, BOUGHT, NOTHING = TOKENIZER.encode(" ".join(OTHERS))
END = TOKENIZER.eos_id
KEYS = (TYPE, COLOR)  # words of types, materials and styles: ids from the first to before the second
PRODUCTS, PER_PAGE, PAGES = 256, len(LABELS), 3
START, RESULTS, DETAIL = range(3)  # where the agent is
O, A, HORIZON = 15, 4, 15
LIMIT = 2**15  # tasks that ids can tell apart


def catalogue(rng: np.random.Generator) -> dict:
    """Products: words [M, 3] (type, material, style, as tokens), price [M], colors [M, 6] and sizes [M, 4] that they come in."""
    triples = rng.choice(len(TYPES) * len(MATERIALS) * len(STYLES), PRODUCTS, replace=False)
    kind, rest = np.divmod(triples, len(MATERIALS) * len(STYLES))
    words = np.stack([TYPE + kind, MATERIAL + rest // len(STYLES), STYLE + rest % len(STYLES)], axis=1)
    some = lambda n, k: np.argsort(rng.random((PRODUCTS, n)), axis=1) < k
    prices = rng.integers(len(PRICES), size=PRODUCTS)
    return dict(words=words.astype(np.int32), price=prices.astype(np.int32), colors=some(len(COLORS), 3), sizes=some(len(SIZES), 2))


def results(shop: dict) -> np.ndarray:
    """The first results of every query: int32 [N + 1, N + 1, PAGES * PER_PAGE] by its two words less KEYS[0], N for no word."""
    keys = np.arange(KEYS[0], KEYS[1] + 1)
    has = np.any(shop["words"][:, :, None] == keys, axis=1) & (keys < KEYS[1])  # [M, N + 1]
    score = has[:, :, None].astype(int) + has[:, None]
    return np.argsort(-score, axis=0, kind="stable")[: PAGES * PER_PAGE].transpose(1, 2, 0).astype(np.int32)


def goal(task) -> jax.Array:
    """What is asked: "find shirt wool plain red small under 40 >", int32 [9]."""
    words = task["wanted"]
    return jnp.stack([FIND, *words, COLOR + task["color"], SIZE + task["size"], UNDER, PRICE + task["price"], TURN]).astype(jnp.int32)


def make(*, seed: int = 0, train_size: int = 2048, heldout_size: int = 512, horizon: int = HORIZON, mistakes: float = 0.25) -> Environment:
    """The environment with its tasks.

    Args:
      mistakes: chance of each of the scripted player's actions to be drawn at random.
    """
    sizes = dict(train=train_size, heldout=heldout_size, novel=heldout_size)
    if sum(sizes.values()) > LIMIT:
        raise UserError(
            f"task.train_size + 2 task.heldout_size = {sum(sizes.values())} is more than the {LIMIT} tasks of shop; lower them."
        )
    if not 0 <= mistakes <= 1:
        raise UserError(f"environment.options.mistakes={mistakes!r} cannot work; set it to a number from 0 to 1.")
    shops = [catalogue(np.random.default_rng([seed, 100 + i])) for i in range(2)]
    goods = {name: jnp.asarray(np.stack([shop[name] for shop in shops])) for name in shops[0]}  # [2, M, ...]
    index = jnp.asarray(np.stack([results(shop) for shop in shops]))

    def draw(rng, split):
        novel = int(split == "novel")
        shop, item = shops[novel], rng.integers(PRODUCTS)
        pick = lambda mask: rng.choice(np.flatnonzero(mask))
        limit = min(shop["price"][item] + rng.integers(3), len(PRICES) - 1)
        return dict(shop=novel, wanted=shop["words"][item], color=pick(shop["colors"][item]), size=pick(shop["sizes"][item]), price=limit)

    worth = jnp.asarray(np.arange(51, dtype=np.float32) / np.float32(50))  # XLA would multiply by 1 / 50, which rounds otherwise

    def listing(state):
        """The observation of a page: "page : a shirt wool plain 30 b ... >"."""
        shown = jax.lax.dynamic_slice(state["results"], (state["page"] * PER_PAGE,), (PER_PAGE,))
        words, price = goods["words"][state["task"]["shop"], shown], goods["price"][state["task"]["shop"], shown]
        lines = jnp.concatenate([LABEL + jnp.arange(PER_PAGE)[:, None], words[:, :2], PRICE + price[:, None]], axis=1)
        return jnp.concatenate([jnp.array([PAGE, COLON]), lines.reshape(-1), jnp.array([TURN])]).astype(jnp.int32)

    def detail(state):
        """The observation of an item: "item shirt wool plain 30 : red blue green small large >"."""
        shop, item = state["task"]["shop"], state["item"]
        colors, sizes = goods["colors"][shop, item], goods["sizes"][shop, item]
        tokens = [ITEM, *goods["words"][shop, item], PRICE + goods["price"][shop, item], COLON]
        keep = [True] * len(tokens) + [*colors, *sizes, True]
        return say([*tokens, *range(COLOR, COLOR + len(COLORS)), *range(SIZE, SIZE + len(SIZES)), TURN], keep, O)

    def reset(key, task):
        del key
        zero = jnp.int32(0)
        state = dict(
            task=task, view=zero, page=zero, item=zero, query=jnp.zeros(2, jnp.int32),
            results=jnp.zeros(PAGES * PER_PAGE, jnp.int32), color=zero - 1, size=zero - 1, invalid=jnp.bool_(False),
        )  # fmt: skip
        return state, say([BEGIN, TURN], [True, True], O)

    def step(state, action):
        task, view, item = state["task"], state["view"], state["item"]
        shop, verb, noun, second = task["shop"], action[0], action[1], action[2]
        key = lambda word: (word >= KEYS[0]) & (word < KEYS[1])
        one, two = ended(action, 2), ended(action, 3)
        searches = (verb == SEARCH) & key(noun) & (one | (two & key(second) & (second != noun)))
        bare = ended(action, 1)
        nexts = bare & (verb == NEXT) & (view == RESULTS) & (state["page"] < PAGES - 1)
        label, color, size = noun - LABEL, noun - COLOR, noun - SIZE
        opens = one & (verb == SHOW) & (view == RESULTS) & (label >= 0) & (label < PER_PAGE)
        inside = lambda x, mask: (x >= 0) & (x < mask.size) & mask[jnp.clip(x, 0, mask.size - 1)]
        at_item = one & (verb == CHOOSE) & (view == DETAIL)
        colors = at_item & inside(color, goods["colors"][shop, item])
        sizes = at_item & inside(size, goods["sizes"][shop, item])
        backs = bare & (verb == BACK) & (view != START)
        buys = bare & (verb == BUY) & (view == DETAIL)

        none = KEYS[1] - KEYS[0]
        query = jnp.where(searches, jnp.stack([noun - KEYS[0], jnp.where(two, second - KEYS[0], none)]), state["query"])
        new = dict(
            state, query=query, results=index[shop, query[0], query[1]],
            view=jnp.where(searches, RESULTS, jnp.where(opens, DETAIL, jnp.where(backs, view - 1, view))),
            page=jnp.where(searches, 0, state["page"] + nexts),
            item=jnp.where(opens, state["results"][jnp.clip(state["page"] * PER_PAGE + label, 0, PAGES * PER_PAGE - 1)], item),
            color=jnp.where(opens | backs | searches, -1, jnp.where(colors, color, state["color"])),
            size=jnp.where(opens | backs | searches, -1, jnp.where(sizes, size, state["size"])),
            invalid=~(searches | nexts | opens | colors | sizes | backs | buys),
        )  # fmt: skip
        words = goods["words"][shop, item]
        points = jnp.sum(words[1:] == task["wanted"][1:]) + (state["color"] == task["color"]) + (state["size"] == task["size"])
        points += goods["price"][shop, item] <= task["price"]
        reward = worth[jnp.where(words[0] == task["wanted"][0], 10 * points, points)]
        page, chosen = searches | nexts | (backs & (view == DETAIL)), colors | sizes
        word = jnp.where(chosen, CHOSEN, jnp.where(backs, BEGIN, jnp.where(buys, BOUGHT, NOTHING)))
        observation = jnp.where(page, listing(new), jnp.where(opens, detail(new), say([word, noun, TURN], [True, chosen, True], O)))
        return new, observation, jnp.where(buys, reward, 0.0).astype(jnp.float32), buys

    def state_id(state):
        """All that an action can change, and the task's number; results follow from the query."""
        u = lambda name: state[name].astype(jnp.uint32)
        query = state["query"].astype(jnp.uint32)  # 2 x 5 bits
        low = query[0] | query[1] << 5 | u("page") << 10 | u("view") << 12 | u("item") << 14 | u("over") << 22
        high = (u("color") + 1) | (u("size") + 1) << 3 | state["task"]["number"].astype(jnp.uint32) << 6
        return jnp.stack([low, high])

    def best(state):
        """What somebody who knows the catalogue does next, int32 [A]."""
        task, shop = state["task"], state["task"]["shop"]
        target = jnp.argmax(jnp.all(goods["words"][shop] == task["wanted"], axis=1))
        place = jnp.argmax(state["results"] == target)
        listed, page = jnp.any(state["results"] == target), place // PER_PAGE
        order = jnp.array([[0, 1], [0, 2], [1, 2]])[state["turn"] % 3]  # another pair of words if one did not find it
        search = jnp.stack([SEARCH, *task["wanted"][order], END])
        simple = lambda *words: jnp.array([*words, END] + [0] * (A - 1 - len(words)))
        open_ = jnp.stack([SHOW, LABEL + place % PER_PAGE, END, 0])
        buy = jnp.where(state["size"] == task["size"], simple(BUY), jnp.stack([CHOOSE, SIZE + task["size"], END, 0]))
        buy = jnp.where(state["color"] == task["color"], buy, jnp.stack([CHOOSE, COLOR + task["color"], END, 0]))
        on_page = jnp.where(page == state["page"], open_, jnp.where(page > state["page"], simple(NEXT), search))
        on_page = jnp.where(listed, on_page, search)
        on_item = jnp.where(state["item"] == target, buy, simple(BACK))
        return jnp.stack([search, on_page, on_item])[state["view"]].astype(jnp.int32)

    def player(key, state):
        errs, kind, pick = jax.random.split(key, 3)
        draw = lambda low, n: low + jax.random.randint(pick, (), 0, n)
        wild = jnp.stack([
            jnp.stack([SEARCH, draw(KEYS[0], KEYS[1] - KEYS[0]), END, 0]), jnp.stack([SHOW, draw(LABEL, PER_PAGE), END, 0]),
            jnp.array([NEXT, END, 0, 0]), jnp.array([BACK, END, 0, 0]), jnp.array([BUY, END, 0, 0]),
            jnp.stack([CHOOSE, draw(COLOR, len(COLORS) + len(SIZES)), END, 0]),
        ])  # fmt: skip
        view, page = state["view"], state["page"]
        sensible = jnp.stack([
            jnp.bool_(True), view == RESULTS, (view == RESULTS) & (page < PAGES - 1), view != START, view == DETAIL, view == DETAIL,
        ])  # fmt: skip
        wild = wild[jax.random.categorical(kind, jnp.where(sensible, 0.0, -jnp.inf))]
        return jnp.where(jax.random.bernoulli(errs, mistakes), wild, best(state)).astype(jnp.int32)

    begin, go = timed(reset, step, horizon)
    return Environment(
        tokenizer=TOKENIZER, observation=O, action=A, horizon=horizon, tasks=draw_tasks(draw, seed, sizes), goal=goal,
        reset=begin, step=go, state_id=state_id, player=player,
    )  # fmt: skip
