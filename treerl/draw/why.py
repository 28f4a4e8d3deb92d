"""Why lines were pruned and tokens not taken, worked out on the host from a finished tree and the numbers of its rules.

The grid keeps no reasons. These are found again where the tree and the rule leave no doubt; elsewhere nothing is said. That
takes what `branching.lookahead` does: trees of it alone may be given here. Its lines write row n at iteration n, slot 0 is never
freed, and a slot that is forked into again begins below whatever was pruned in it; only samples that fill slots, which
neither fork nor are pruned, begin above.
"""

import numpy as np

from treerl.tree import ENVIRONMENT, FORCED, SIMILAR

Cell = tuple[int, int]  # (row, column)


def _first(parent: np.ndarray, row: int, column: int) -> int:
    """Row of the first own token of the line that wrote a cell."""
    while row and parent[row, column] == column:
        row -= 1
    return row


def _grew(tree, row: int, column: int) -> bool:
    """Whether a line that begins in a cell is one that forks, if slot 0's does: that one, and what forked."""
    return bool(tree.source[row, column] == FORCED) or (row, column) == (0, 0)


def edits(a, b) -> int:
    """Levenshtein's distance."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            corner, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, corner + (x != y))
    return line[-1]


def similar(tree, *, windows: tuple[int, ...], tau_ed: float, eos, read=None) -> dict[Cell, str]:
    """Why `pruning.similarity` stopped the lines of one tree of text: the cell that a line ends in -> words.

    Args:
      tree: numpy, unbatched, without an environment. windows, tau_ed: the rule's own. eos: tokens that end a line.
      read: token ids -> text, by which the other line is quoted, too.
    """
    token, parent, last, eos = tree.token, tree.parent, tree.token.shape[0] - 1, np.asarray(eos).tolist()
    over = lambda row, column: row == last or token[row, column] in eos  # so that the line ran no more

    def own(row: int, column: int) -> str:
        """What is said of a line that is like its parent."""
        first = _first(parent, row, column)
        count, slot = row - first + 1, max(int(parent[first, column]), 0)  # what forks at the prompt is slot 0's
        begin = _first(parent, row, slot)
        if count not in windows or slot == column or begin >= max(first, 1) or over(row, column) or over(row, slot):
            return ""  # not compared here, or not any more with what lies in the parent's slot
        if not (_grew(tree, first, column) and _grew(tree, begin, slot)):
            return ""
        found, bar = edits(*token[first : row + 1, [column, slot]].T.tolist()), np.float32(tau_ed) * np.float32(count)
        quote = f" ({read(token[first : row + 1, slot].tolist())!r})" if read else ""
        told = f"{found} edit{'s' * (found != 1)} in the {count} tokens since the fork, below tau_ed x {count} = {bar:g}"
        return f"similar to the line in slot {slot}{quote}: {told}" if found < bar else ""

    def why(row: int, column: int) -> str:
        """The same, or which line above it a line went with: all that stand on one go at once."""
        line = column
        while tree.end[row, column] == SIMILAR:
            if told := own(row, column):
                return told if column == line else f"stood on the line in slot {column}, which was {told}"
            first = _first(parent, row, column)
            if not first:
                break
            row, column = first - 1, int(parent[first, column])
            while row < last and parent[row + 1, column] == column:
                row += 1
        return ""

    ends = [tuple(cell) for cell in np.argwhere(tree.used & (tree.end == SIMILAR)).tolist()]
    return {cell: told for cell in ends if (told := why(*cell))}


def not_taken(
    tree, likeliest: dict, *, tau_abs: float, tau_rel: float, max_children: int, forks: bool, whole: bool
) -> dict[Cell | None, dict[int, str]]:
    """Why `branching.lookahead` started no line on a likely token: cell, or None for the prompt -> token -> words.

    Probabilities that another program computed again are held against the thresholds up to four times what they differ by from
    the sampler's at the tree's own tokens.

    Args:
      tree: numpy, unbatched; grown without a review, in an environment with forks at any token.
      likeliest: cell, or None -> [(token, probability)], the likeliest next tokens of the untempered policy, in descending order.
      tau_abs, tau_rel, max_children: the rule's own. forks: slot 0 grows by forks, as it does if round(share * K) > 0.
      whole: no line began in a slot that another had left, so that all forks there were are still to be seen.
    """
    token, parent, below = tree.token, tree.parent, {}
    for s, k in np.argwhere(tree.used).tolist():
        below.setdefault((s - 1, int(parent[s, k])) if s else None, []).append((s, k))
    off = [
        abs(float(np.exp(tree.logp_policy[cell])) - p)
        for above, pairs in likeliest.items() for cell in below.get(above, ()) for other, p in pairs if other == token[cell]
    ]  # fmt: skip
    doubt = 1e-6 + 4 * max(off, default=0.0)

    def why(line: Cell, pairs: list, other: int, p: float) -> str:
        top, second = pairs[0][1], pairs[1][1] if len(pairs) > 1 else 0.0
        bar = max(tau_abs, top - tau_rel)
        rivals = [q for rival, q in pairs if rival not in (other, token[line])]
        if not (forks and _grew(tree, _first(parent, *line), line[1])):
            return "lines here do not fork"
        if p < tau_abs - doubt:
            return f"below tau_abs={tau_abs:g}"
        if p < top - tau_rel - doubt:
            return f"tau_rel={tau_rel:g} or more below the likeliest"
        if second < bar - doubt < bar + doubt < p:
            return "a fork needs two tokens likely enough"
        if min(p, second) < bar + doubt:
            return ""
        if sum(q > p + doubt for q in rivals) >= max_children:
            return f"max_children={max_children} likelier ones"
        if sum(q > p - doubt for q in rivals) >= max_children or p < pairs[-1][1] + doubt:
            return ""
        return "no free slot" if whole else "no free slot, or its line was pruned and overwritten"

    found = {}
    for above, pairs in likeliest.items():
        line = (0, 0) if above is None else (above[0] + 1, above[1])  # the token that the line took which might have forked
        if line in below.get(above, ()) and tree.source[line] != ENVIRONMENT:
            taken = {int(token[cell]) for cell in below[above]}
            told = {other: why(line, pairs, other, p) for other, p in pairs if other not in taken}
            found[above] = {other: words for other, words in told.items() if words}
    return found
