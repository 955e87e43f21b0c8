"""Stands in for a score: fake_score.py OUTPUT CHECKPOINTS FLAGS writes a number that follows from the run's metrics."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    output, checkpoints = map(Path, sys.argv[1:3])
    assert (checkpoints / "latest_checkpointed_iteration.txt").exists(), "nothing to score"
    last = json.loads((checkpoints / "metrics.jsonl").read_text().splitlines()[-1])
    output.write_text(json.dumps({"results": {"task": {"acc,none": 100 - 10 * last["validation_loss"]}}}))


if __name__ == "__main__":
    main()
