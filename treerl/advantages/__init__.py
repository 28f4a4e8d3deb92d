"""Group-relative advantage estimators, one function a file.

Each is `estimator(tree, reward [L], **options)` of one tree, returning leaf credit [L] or cell
credit [S, K]; callers vmap, and `tree.spread` turns either into what the learner reads.
"""
from treerl.advantages.branch_depthwise import branch_depthwise
from treerl.advantages.grpo import grpo

ESTIMATORS = {"branch_depthwise": branch_depthwise, "grpo": grpo}
