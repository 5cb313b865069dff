"""Random networks: every law of the tests on architectures that are drawn, thousands of them.

    python -m bench.random_networks [--count 10000] [--seed 0] [--out bench/results/random_networks.jsonl]

Each line of the log is one network: its number, its recipe, and what broke, if anything did. The run goes on after a
failure and ends with exit code 1 if there was any; the same seed draws the same networks. A failure is shrunk by the
test suite: paste the recipe into tests/test_random_networks.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "random_networks.jsonl")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    import torch
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from strategies import Recipe, recipes

    torch.set_num_threads(1)
    failures, count, start = 0, 0, time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as log:

        @seed(options.seed)
        @settings(
            max_examples=options.count, phases=[Phase.generate], database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(recipes())
        def run(recipe: Recipe) -> None:
            nonlocal failures, count
            fault = check(recipe)
            failures += fault is not None
            log.write(json.dumps({"number": count, "recipe": repr(recipe), "fault": fault}) + "\n")
            log.flush()
            count += 1
            if fault or count % 100 == 0:
                pace = (time.perf_counter() - start) / count
                print(
                    f"{count} networks, {failures} failed, {pace:.2f} s each{f': {fault}' if fault else ''}", flush=True
                )

        run()
    print(f"{count} networks, {failures} failed, {time.perf_counter() - start:.0f} s")
    sys.exit(failures > 0)


def check(recipe: Any) -> str | None:
    """What broke on one network, or None."""
    from laws import check_laws

    try:
        model, inputs = recipe.build()
        again = "shuffle" not in {step.kind for step in recipe.steps}
        check_laws(model, inputs, seed=recipe.seed, inferred_again=again)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return None


if __name__ == "__main__":
    main()
