"""Random networks: every law of the tests on architectures that are drawn, thousands of them.

    python -m bench.random_networks [--count 10000] [--seed 0] [--resume]

Each line of the log is one network: its draw, its recipe, and what broke, if anything did. Networks come in draws of
500, each with a seed of its own, so that a run that was stopped goes on with the next draw. It goes on after a
failure and ends with exit code 1 if there was any. A failure is shrunk by the test suite: paste the recipe into
tests/test_random_networks.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from bench import page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

LOG = page.RESULTS / "random_networks.jsonl"
AT_ONCE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on after the draws that the log holds whole")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    import torch

    torch.set_num_threads(1)
    rows = finished() if options.resume else []
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {row["draw"] for row in rows}
    for place in range(-(-options.count // AT_ONCE)):
        draw = options.seed + place
        if draw not in done:
            rows += drawn(draw, min(AT_ONCE, options.count - place * AT_ONCE))
            failed = sum(row["fault"] is not None for row in rows)
            print(f"{len(rows)} networks, {failed} failed, {rows[-1]['seconds'] / AT_ONCE:.2f} s each", flush=True)
            render(rows)
    sys.exit(any(row["fault"] for row in rows))


def finished() -> list[dict[str, Any]]:
    """Rows of the draws that are whole."""
    if not LOG.exists():
        return []
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    counts = Counter(row["draw"] for row in rows)
    return [row for row in rows if counts[row["draw"]] >= AT_ONCE]


def drawn(draw: int, count: int) -> list[dict[str, Any]]:
    """Check the networks of one draw; each goes to the log as it is done."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from strategies import Recipe, recipes

    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with LOG.open("a", encoding="utf-8") as log:

        @seed(draw)
        @settings(
            max_examples=count, phases=[Phase.generate], database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(recipes())
        def run(recipe: Recipe) -> None:
            row = {"draw": draw, "number": len(rows), "recipe": repr(recipe), "fault": check(recipe)}
            rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
            log.write(json.dumps(rows[-1]) + "\n")
            log.flush()
            if row["fault"]:
                print(f"draw {draw}, network {row['number']}: {row['fault']}\n{row['recipe']}", flush=True)

        run()
    return rows


def render(rows: list[dict[str, Any]]) -> None:
    """Write the page."""
    failed = [row for row in rows if row["fault"]]
    draws = sorted({row["draw"] for row in rows})
    different = len({row["recipe"] for row in rows})
    note = (
        f"{len(rows)} networks, {different} of them different, in draws {draws[0]} to {draws[-1]} of {AT_ONCE}: "
        f"{len(failed)} broke a law of tests/laws.py (proof, costs, shapes, a second inference, the user's class ...)."
    )
    lines = [f"- draw {row['draw']}, network {row['number']}: {row['fault']}: `{row['recipe']}`" for row in failed]
    page.write(
        page.RESULTS / "random_networks.md",
        "Random networks",
        [page.header(1), note, "\n".join(lines) or "No failures."],
    )


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
