"""What several tests share, and the benchmarks too: problems, the oracle, tiny models, and kernels without a GPU."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
