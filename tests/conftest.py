"""Set before JAX starts: tests compile hundreds of small programs that each run once."""
import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
